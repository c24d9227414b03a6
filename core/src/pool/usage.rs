use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::ModelPool;
use super::driver::{self, Command};
use crate::backend::ServedBy;
use crate::config::{Class, ModelRole};
use crate::error::Error;
use crate::memory::{Estimate, Footprint, SystemMemory};
use crate::scheduler::{PlannedLoad, SlotId};
use crate::units::{Bytes, ModelName};

/// Who holds how much memory, estimated and measured.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryUsage {
    /// The budget.
    pub budget_bytes: Bytes,
    /// What models may hold just now: the budget, or what the machine has memory for where that is less.
    pub limit_bytes: Bytes,
    /// How much of the budget other processes have, where they share it.
    pub others_bytes: Bytes,
    /// What the ledger holds.
    pub used_bytes: Bytes,
    /// What loads may still take.
    pub headroom_bytes: Bytes,
    /// The most it ever held.
    pub peak_bytes: Bytes,
    /// LLMs loaded or loading.
    pub llms: usize,
    /// The limit on these.
    pub max_concurrent_llms: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// One entry per place of each model.
    pub models: Vec<ModelMemory>,
    /// The machine and this process, where the platform tells.
    pub system: Option<SystemMemory>,
}

/// One place of a model, and what it holds.
#[derive(Clone, Debug, Serialize)]
pub struct ModelMemory {
    /// The model.
    pub model: ModelName,
    /// The place.
    pub served_by: ServedBy,
    /// What it is for.
    pub role: ModelRole,
    /// `absent`, `loading`, `ready`, ...
    pub state: &'static str,
    /// How hard the pool holds on to it.
    pub class: Class,
    /// Whether it is pinned.
    pub pinned: bool,
    /// What its load was expected to take; `None` if it is not loaded.
    pub estimated_bytes: Option<Bytes>,
    /// The same, by kind, for the context that it has now.
    pub estimate: Option<Estimate>,
    /// What the ledger holds for it.
    pub reserved_bytes: Bytes,
    /// What it holds, as measured: what is resident of its file just now, and by what the process's own memory grew
    /// with its load. `None` if it is not loaded or cannot be measured.
    pub measured_bytes: Option<Bytes>,
    /// The same, by kind.
    pub measured: Option<Footprint>,
    /// Its context length in tokens, where it is known.
    pub n_ctx: Option<u32>,
    /// Requests that run on it.
    pub active: usize,
    /// Requests that wait for it.
    pub waiting: usize,
    /// Seconds it has been idle, if it is.
    pub idle_seconds: Option<f64>,
    /// Seconds until its TTL ends, if it has one and is idle.
    pub expires_in_seconds: Option<f64>,
    /// Why its last load failed, while that holds the next one back.
    pub failure: Option<String>,
}

/// What a request for one place of a model would do.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedModel {
    /// The model.
    pub model: ModelName,
    /// The place.
    pub served_by: ServedBy,
    /// Whether this place is tried only when another one fails.
    pub fallback: bool,
    /// Whether it would be served without waiting for a request in progress.
    pub fits: bool,
    /// What the place would take, by kind; `None` if its size cannot be told.
    pub estimate: Option<Estimate>,
    /// The models that would be loaded.
    pub load: Vec<ModelName>,
    /// The models that would be evicted.
    pub evict: Vec<ModelName>,
    /// The models whose context would become shorter.
    pub shorten: Vec<ModelName>,
    /// Seconds that freeing their memory took the last time; `None` where that is not known of all of them.
    pub freeing_seconds: Option<f64>,
    /// Seconds that the loads took the last time; `None` where that is not known of all of them.
    pub load_seconds: Option<f64>,
    /// Why it would be refused.
    #[serde(serialize_with = "as_text")]
    pub refuse: Option<Error>,
}

impl ModelPool {
    /// Who holds how much, measured at this moment.
    ///
    /// # Errors
    /// The pool is shut down.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn memory_usage(&self) -> Result<MemoryUsage, Error> {
        let status = self.status().await?;
        let pool = self.clone();
        // Reads the kernel's page tables: not for a thread that serves others.
        let measure = move || {
            let shared = &pool.inner.shared;
            let ready =
                status.slots.iter().map(|slot| shared.ready.get(&slot.slot).map(|model| model.clone()));
            let models = status.slots.iter().zip(ready).map(|(slot, model)| {
                let measured = model.as_ref().and_then(|model| driver::measured(|| model.memory()));
                ModelMemory {
                    model: slot.model.clone(),
                    served_by: shared.slots[slot.slot.0].backend.served_by(),
                    role: pool.inner.models[&slot.model].role,
                    state: slot.phase.as_str(),
                    class: slot.class,
                    pinned: slot.pinned,
                    estimated_bytes: slot.estimate.as_ref().map(Estimate::total),
                    estimate: slot.estimate.clone(),
                    reserved_bytes: slot.reserved,
                    measured_bytes: measured.and_then(|measured| measured.total()),
                    measured,
                    n_ctx: model.as_ref().and_then(|model| model.n_ctx()),
                    active: slot.leases,
                    waiting: slot.waiting,
                    idle_seconds: slot.idle.map(|idle| idle.as_secs_f64()),
                    expires_in_seconds: slot.expires_in.map(|time| time.as_secs_f64()),
                    failure: slot.failure.clone(),
                }
            });
            MemoryUsage {
                budget_bytes: status.budget,
                limit_bytes: status.limit,
                others_bytes: status.others,
                used_bytes: status.used,
                headroom_bytes: status.left,
                peak_bytes: status.peak,
                llms: status.llms,
                max_concurrent_llms: status.max_concurrent_llms,
                waiting: status.waiting,
                models: models.collect(),
                system: shared.probe.read(),
            }
        };
        tokio::task::spawn_blocking(measure).await.map_err(|_| Error::ShuttingDown)
    }

    /// What requests for these models, one after another, would load, evict and refuse: one entry per place of each.
    /// Reads the files' headers; loads nothing. First choices are planned as if all were asked for in turn, each
    /// fallback as if it were asked for instead.
    ///
    /// # Errors
    /// A model is unknown, or the pool is shut down.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn plan(&self, models: &[&str]) -> Result<Vec<PlannedModel>, Error> {
        let entries = models.iter().map(|model| self.inner.entry(model)).collect::<Result<Vec<_>, _>>()?;
        let left = self.status().await?.left;
        let mut sizes = BTreeMap::new();
        for slot in entries.iter().flat_map(|(_, entry)| &entry.chain) {
            if !sizes.contains_key(slot) {
                sizes.insert(*slot, self.inner.shared.estimate(*slot, left).await);
            }
        }
        let mut planned = Vec::new();
        let mut before = Vec::new();
        for (name, entry) in entries {
            for (at, slot) in entry.chain.iter().enumerate() {
                let slots = before.iter().copied().chain([*slot]).collect();
                let command = |reply| Command::Plan { slots, sizes: sizes.clone(), reply };
                let Some(plan) = self.inner.ask(command).await?.pop() else {
                    return Err(Error::ShuttingDown);
                };
                let load_times = plan.load.iter().map(|load| match load.estimate.reserve() {
                    // There is nothing to load for a model on a host.
                    Bytes::ZERO => Some(0.0),
                    _ => load.estimate.load_time.map(|time| time.as_secs_f64()),
                });
                planned.push(PlannedModel {
                    model: name.clone(),
                    served_by: self.inner.shared.slots[slot.0].backend.served_by(),
                    fallback: at > 0,
                    fits: plan.fits,
                    estimate: sizes.get(slot).and_then(|size| size.clone().ok()),
                    load: plan.load.iter().map(|load: &PlannedLoad| self.model_of(load.slot)).collect(),
                    evict: plan.evict,
                    shorten: plan.shorten,
                    freeing_seconds: plan.freeing.map(|time| time.as_secs_f64()),
                    load_seconds: load_times.sum(),
                    refuse: plan.refuse,
                });
            }
            before.extend(entry.chain.first().copied());
        }
        Ok(planned)
    }

    fn model_of(&self, slot: SlotId) -> ModelName {
        self.inner.shared.slots[slot.0].model.clone()
    }
}

fn as_text<S: Serializer>(error: &Option<Error>, serializer: S) -> Result<S::Ok, S::Error> {
    error.as_ref().map(ToString::to_string).serialize(serializer)
}

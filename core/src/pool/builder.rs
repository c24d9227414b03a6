use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use dashmap::DashMap;
use tokio::runtime::Handle;
use tokio::sync::{broadcast, mpsc};

use super::driver::{Driver, capped};
use super::metrics::Metrics;
use super::sharing::Sharing;
use super::{Inner, ModelEntry, ModelPool, Shared, SlotEntry};
use crate::answer::OnStreamFailure;
use crate::backend::Backend;
use crate::config::{Class, ConfigError, ModelRole};
use crate::error::Error;
use crate::memory::{Probe, SharedBudget, SystemProbe};
use crate::scheduler::{Limits, Scheduler, SlotId, SlotSpec};
use crate::units::{Bytes, ModelName};

/// Commands that may be on their way to the driver at once.
const COMMANDS: usize = 64;

/// A logical model for a pool.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    /// Its name.
    pub name: ModelName,
    /// What it is for.
    pub role: ModelRole,
    /// How hard the pool holds on to it.
    pub class: Class,
    /// Unloaded after this long without a request.
    pub ttl: Option<Duration>,
    /// What becomes of an answer whose place fails in the middle.
    pub on_stream_failure: OnStreamFailure,
    /// The next place is made ready when a host has said nothing for this long, as far as there is room; `None` waits until
    /// it is needed.
    pub hedge_after: Option<Duration>,
    /// Where it can run, first choice first.
    pub places: Vec<PlaceSpec>,
}

impl ModelSpec {
    /// An LLM that is loaded on demand.
    #[must_use]
    pub fn new(name: ModelName, places: Vec<PlaceSpec>) -> Self {
        Self {
            name,
            role: ModelRole::Llm,
            class: Class::OnDemand,
            ttl: None,
            on_stream_failure: OnStreamFailure::default(),
            hedge_after: None,
            places,
        }
    }
}

/// A place where a model can run.
#[derive(Clone, Debug)]
pub enum PlaceSpec {
    /// What runs the model.
    Backend(Arc<dyn Backend>),
    /// All places of another model.
    Model(ModelName),
}

/// Builds a [`ModelPool`].
pub struct PoolBuilder {
    limits: Limits,
    wait_timeout: Duration,
    models: Vec<ModelSpec>,
    probe: Arc<dyn Probe>,
    monitor_interval: Duration,
    share: Option<SharedBudget>,
}

/// The part of the machine's memory, or of the control group's limit, that models never take, and its bound: the system,
/// other programs and the rest of this process live there.
const RESERVE_PART: u64 = 16;
const MOST_RESERVE: Bytes = Bytes(1_000_000_000);

impl PoolBuilder {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            wait_timeout: Duration::from_mins(5),
            models: Vec::new(),
            probe: Arc::new(SystemProbe::new()),
            monitor_interval: Duration::from_secs(30),
            share: None,
        }
    }

    /// Adds a model.
    #[must_use]
    pub fn model(mut self, model: ModelSpec) -> Self {
        self.models.push(model);
        self
    }

    /// How long requests wait for their model unless they say otherwise; 5 minutes if not set.
    #[must_use]
    pub fn wait_timeout(mut self, wait: Duration) -> Self {
        self.wait_timeout = wait;
        self
    }

    /// Where memory figures come from; this machine if not set.
    #[must_use]
    pub fn probe(mut self, probe: Arc<dyn Probe>) -> Self {
        self.probe = probe;
        self
    }

    /// How often the machine's memory is looked at; 30 seconds if not set. The kernel's own word that memory is short,
    /// and a load, come in between.
    #[must_use]
    pub fn monitor_interval(mut self, interval: Duration) -> Self {
        self.monitor_interval = interval;
        self
    }

    /// Has the pool hold its budget together with other processes; alone if not set.
    #[must_use]
    pub fn share_budget(mut self, share: SharedBudget) -> Self {
        self.share = Some(share);
        self
    }

    /// Starts the pool. Nothing is loaded yet: see [`ModelPool::load_residents`]. The budget is what the limits say, but
    /// no more than the machine's memory, or its control group's limit, less a sixteenth.
    /// Install a metrics recorder before, or the pool's metrics go nowhere.
    ///
    /// # Errors
    /// A model is there twice or has no place, a fallback names a model that is not there or leads back to itself, or
    /// there is no tokio runtime around.
    pub fn build(self) -> Result<ModelPool, Error> {
        let runtime = Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let mut slots = Vec::new();
        let mut specs = Vec::new();
        let mut models = BTreeMap::new();
        for model in &self.models {
            let mut own = Vec::new();
            for place in &model.places {
                let PlaceSpec::Backend(backend) = place else { continue };
                own.push(SlotId(slots.len()));
                slots.push(SlotEntry { model: model.name.clone(), backend: Arc::clone(backend) });
                specs.push(SlotSpec {
                    model: model.name.clone(),
                    llm: model.role == ModelRole::Llm,
                    class: model.class,
                    capabilities: backend.capabilities(),
                    parallel: backend.parallel().max(1),
                    ttl: model.ttl,
                });
            }
            let entry = ModelEntry {
                role: model.role,
                class: model.class,
                on_stream_failure: model.on_stream_failure,
                hedge_after: model.hedge_after,
                slots: own,
                chain: Vec::new(),
            };
            if models.insert(model.name.clone(), entry).is_some() {
                return Err(problem(&model.name, "this model is there twice"));
            }
        }
        for model in &self.models {
            let chain = self.chain(model, &models, &mut BTreeSet::new())?;
            if let Some(entry) = models.get_mut(&model.name) {
                entry.chain = chain;
            }
        }

        // A place for every request that may wait or run: returning one never has to wait.
        let running = specs.iter().map(|spec| spec.parallel).sum::<usize>();
        let (returns, returned) = mpsc::channel(self.limits.max_waiting + running + COMMANDS + 1);
        let (commands, commanded) = mpsc::channel(COMMANDS);
        let (events, _) = broadcast::channel(1024);
        let mut limits = self.limits;
        let total = self.probe.read().map(|memory| memory.total);
        let reserve = total.map(|total| Bytes(total.0 / RESERVE_PART).min(MOST_RESERVE)).unwrap_or_default();
        limits.reserve = limits.reserve.max(reserve);
        let most = total.map(|total| total.saturating_sub(limits.reserve));
        let limits = limits.with_budget(capped(limits.budget, most));
        let metrics = Metrics::new(&limits, &slots);
        let shared =
            Arc::new(Shared { slots, ready: DashMap::new(), events, metrics, probe: self.probe, most });
        let scheduler = Scheduler::new(limits, specs.clone());
        let share = self.share.map(Sharing::new);
        let inputs = (commanded, returned);
        let driver = Driver::new(scheduler, Arc::clone(&shared), inputs, self.monitor_interval, share);
        runtime.spawn(driver.run());
        let inner = Inner {
            shared,
            models,
            specs,
            commands,
            returns,
            next_request: AtomicU64::new(0),
            wait_timeout: self.wait_timeout,
            max_waiting: self.limits.max_waiting,
        };
        Ok(ModelPool { inner: Arc::new(inner) })
    }

    /// The slots of a model in the order of its places, those of fallback models in their place.
    fn chain(
        &self,
        model: &ModelSpec,
        models: &BTreeMap<ModelName, ModelEntry>,
        above: &mut BTreeSet<ModelName>,
    ) -> Result<Vec<SlotId>, Error> {
        if !above.insert(model.name.clone()) {
            return Err(problem(&model.name, "its fallbacks lead back to itself"));
        }
        let mut own = models.get(&model.name).map(|entry| entry.slots.iter()).into_iter().flatten();
        let mut chain = Vec::new();
        for place in &model.places {
            match place {
                PlaceSpec::Backend(_) => chain.extend(own.next()),
                PlaceSpec::Model(other) => {
                    let other = self.models.iter().find(|spec| spec.name == *other).ok_or_else(|| {
                        problem(&model.name, &format!("falls back to {other}, which is not a model"))
                    })?;
                    chain.extend(self.chain(other, models, above)?);
                }
            }
        }
        above.remove(&model.name);
        if chain.is_empty() {
            return Err(problem(&model.name, "this model has no place to run"));
        }
        Ok(chain)
    }
}

fn problem(model: &ModelName, message: &str) -> Error {
    Error::Config(ConfigError::of(format!("models.{model}"), message))
}

impl fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolBuilder")
            .field("limits", &self.limits)
            .field("models", &self.models)
            .finish_non_exhaustive()
    }
}

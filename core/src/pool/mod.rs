//! The pool: a handle to the models, and the task that owns their scheduler.
//!
//! The life of a request: [`ModelHandle`] walks over the places of its model (`walk.rs`), leases each from the
//! driver task until one answers, and returns that one's answer together with the lease. The driver owns the
//! [`Scheduler`](crate::scheduler::Scheduler), feeds it events and carries out its effects.

mod builder;
mod driver;
mod events;
mod handle;
mod lease;
mod metrics;
mod sharing;
mod simulated;
mod stream;
mod usage;
mod walk;

pub use builder::{ModelSpec, PlaceSpec, PoolBuilder};
pub use events::{PoolEvent, PoolEvents};
pub use handle::ModelHandle;
pub use lease::Lease;
pub use simulated::{Replay, Replayed, TracedRequest};
pub use usage::{MemoryUsage, ModelMemory, PlannedModel};

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant;

use crate::answer::{OnStreamFailure, Priority};
use crate::backend::{Backend, HostState, Model, ServedBy};
use crate::config::{Budget, Class, ModelRole};
use crate::error::Error;
use crate::memory::{Ledger, Probe};
use crate::scheduler::{Limits, PoolStatus, RequestId, SlotId, SlotSpec};
use crate::units::{Bytes, ModelName};
use driver::Command;
use lease::{Returned, Wanted};
use metrics::Metrics;

/// Several models behind one budget. A cheap clone; the pool ends when the last clone, handle and lease are gone, or
/// in order through [`ModelPool::shutdown`].
#[derive(Clone)]
pub struct ModelPool {
    inner: Arc<Inner>,
}

/// What clones of the pool share. The driver does not hold it: it ends when the channels close.
struct Inner {
    shared: Arc<Shared>,
    models: BTreeMap<ModelName, ModelEntry>,
    /// As the scheduler was given them.
    specs: Vec<SlotSpec>,
    commands: mpsc::Sender<Command>,
    returns: mpsc::Sender<Returned>,
    next_request: AtomicU64,
    wait_timeout: Duration,
    max_waiting: usize,
}

/// What the pool and its driver share.
struct Shared {
    slots: Vec<SlotEntry>,
    /// The models that are ready, for requests that were granted and for measurements.
    ready: DashMap<SlotId, Arc<dyn Model>>,
    events: broadcast::Sender<PoolEvent>,
    metrics: Metrics,
    probe: Arc<dyn Probe>,
    /// What models can ever hold on this machine, whatever the budget; `None` where the platform does not tell.
    most: Option<Bytes>,
}

/// A model's name, and where it can run.
struct ModelEntry {
    role: ModelRole,
    class: Class,
    on_stream_failure: OnStreamFailure,
    hedge_after: Option<Duration>,
    /// Its own slots.
    slots: Vec<SlotId>,
    /// All slots that may serve it, in the order in which they are tried: its own, then those of other models.
    chain: Vec<SlotId>,
}

struct SlotEntry {
    model: ModelName,
    backend: Arc<dyn Backend>,
}

impl ModelPool {
    /// Starts building a pool with these limits.
    #[must_use]
    pub fn builder(limits: Limits) -> PoolBuilder {
        PoolBuilder::new(limits)
    }

    /// A handle to a model that is ready to answer: loads it if it is not.
    ///
    /// # Errors
    /// The model is unknown, or none of its places can be made ready in time and budget.
    ///
    /// # Cancel safety
    /// Cancel safe: a load that nobody else waits for is given up.
    pub async fn get(&self, model: &str) -> Result<ModelHandle, Error> {
        let handle = self.handle(model)?;
        drop(handle.lease().await?);
        Ok(handle)
    }

    /// A handle to a model, loaded or not. Requests on it load the model when they need it.
    ///
    /// # Errors
    /// No model has that name.
    pub fn handle(&self, model: &str) -> Result<ModelHandle, Error> {
        let (name, _) = self.inner.entry(model)?;
        Ok(ModelHandle::new(Arc::clone(&self.inner), name.clone()))
    }

    /// Loads a model without using it.
    ///
    /// # Errors
    /// As for [`ModelPool::get`].
    ///
    /// # Cancel safety
    /// Cancel safe, as [`ModelPool::get`].
    pub async fn load(&self, model: &str) -> Result<(), Error> {
        self.get(model).await.map(drop)
    }

    /// Loads the first of a model's places that takes memory of this process, passing over hosts.
    ///
    /// # Errors
    /// The model is unknown, has no such place, or it cannot be made ready in time and budget.
    ///
    /// # Cancel safety
    /// Cancel safe, as [`ModelPool::get`].
    pub async fn load_local(&self, model: &str) -> Result<(), Error> {
        let (name, entry) = self.inner.entry(model)?;
        let local = |slot: &&SlotId| self.inner.shared.slots[slot.0].backend.hosts().is_none();
        let capability = entry.role.capability();
        let Some(slot) = entry.slots.iter().find(local) else {
            return Err(Error::Unsupported { model: name.clone(), capability });
        };
        let wanted = Wanted {
            capability,
            priority: Priority::Background,
            deadline: self.inner.deadline(None),
            spare: None,
        };
        Lease::acquire(&self.inner, *slot, wanted).await.map(drop)
    }

    /// Loads a model that is likely to be asked soon: its first place, passing over hosts that are left alone just now. A
    /// host that is asked as usual has nothing to load. Nothing is evicted for it that was used within the last minute.
    ///
    /// # Errors
    /// The model is unknown, or there is no room for it without that.
    ///
    /// # Cancel safety
    /// Cancel safe, as [`ModelPool::get`].
    pub async fn load_ahead(&self, model: &str) -> Result<(), Error> {
        let (_, entry) = self.inner.entry(model)?;
        for slot in &entry.chain {
            let backend = &self.inner.shared.slots[slot.0].backend;
            if backend.hosts().is_some() {
                match backend.available() {
                    Ok(()) => return Ok(()),
                    Err(_) => continue,
                }
            }
            let wanted = Wanted {
                capability: entry.role.capability(),
                priority: Priority::Background,
                deadline: self.inner.deadline(None),
                spare: Some(walk::SPARED),
            };
            return Lease::acquire(&self.inner, *slot, wanted).await.map(drop);
        }
        Ok(())
    }

    /// Loads all resident models and waits for them; gives each one's result. Where all of them do not fit the budget
    /// together, none is loaded and each has that error.
    ///
    /// # Cancel safety
    /// Cancel safe: loads that have started go on, because residents are pinned.
    pub async fn load_residents(&self) -> Vec<(ModelName, Result<(), Error>)> {
        let residents = || self.inner.models.iter().filter(|(_, entry)| entry.class == Class::Resident);
        if let Err(error) = self.residents_fit(residents()).await {
            return residents().map(|(name, _)| (name.clone(), Err(error.clone()))).collect();
        }
        let loads = residents().map(|(name, _)| async { (name.clone(), self.load(name.as_str()).await) });
        futures::future::join_all(loads).await
    }

    /// Whether the first places of these models fit the budget together. One whose size cannot be told counts as nothing: its
    /// load will say why.
    async fn residents_fit(
        &self,
        residents: impl Iterator<Item = (&ModelName, &ModelEntry)>,
    ) -> Result<(), Error> {
        let Limits { budget, spare, .. } = self.inner.ask(|reply| Command::Limits { reply }).await?;
        let mut all = Ledger::new(Bytes(u64::MAX));
        let mut entries = Vec::new();
        for (name, entry) in residents {
            let Some(slot) = entry.chain.first() else { continue };
            if let Ok(estimate) = self.inner.shared.estimate(*slot, budget).await
                && let Ok(entry) = all.try_reserve(name, &estimate)
            {
                entries.push(entry);
            }
        }
        let (asked, models) = (all.used() + spare, all.holders());
        if asked > budget {
            return Err(Error::ResidentsOverBudget { asked, budget, models });
        }
        Ok(())
    }

    /// Gives back the memory of all places of a model; returns the bytes that were held for it once they are back.
    /// A model that is not loaded gives zero. Nothing is deleted.
    ///
    /// # Errors
    /// The model is unknown, in use or pinned.
    ///
    /// # Cancel safety
    /// Dropping the future does not stop an unload that has started.
    pub async fn unload(&self, model: &str) -> Result<Bytes, Error> {
        let (_, entry) = self.inner.entry(model)?;
        let mut freed = Bytes::ZERO;
        for slot in &entry.slots {
            let id = self.inner.next_request();
            freed += self.inner.ask(|reply| Command::Unload { id, slot: *slot, reply }).await??;
        }
        Ok(freed)
    }

    /// Has the hosts among a model's places free its memory, without deleting anything. Returns these hosts.
    ///
    /// # Errors
    /// The model is unknown, or a host cannot be reached, refuses, or does not confirm in time.
    ///
    /// # Cancel safety
    /// Cancel safe: a host may or may not have got the request.
    pub async fn unload_on_hosts(&self, model: &str) -> Result<Vec<ServedBy>, Error> {
        let (name, entry) = self.inner.entry(model)?;
        let mut hosts = Vec::new();
        for slot in &entry.slots {
            let backend = &self.inner.shared.slots[slot.0].backend;
            let served_by = backend.served_by();
            match backend.unload_on_hosts().await {
                Ok(freed) => hosts.extend(freed),
                Err(cause) => return Err(Error::Request { model: name.clone(), served_by, cause }),
            }
        }
        Ok(hosts)
    }

    /// Keeps a model from being evicted. A model that is not loaded is not loaded by this.
    ///
    /// # Errors
    /// The model is unknown, or the pool is shutting down.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn pin(&self, model: &str) -> Result<(), Error> {
        self.set_pinned(model, true).await
    }

    /// Allows a model to be evicted again, a resident one too.
    ///
    /// # Errors
    /// The model is unknown, or the pool is shutting down.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn unpin(&self, model: &str) -> Result<(), Error> {
        self.set_pinned(model, false).await
    }

    async fn set_pinned(&self, model: &str, pinned: bool) -> Result<(), Error> {
        let (_, entry) = self.inner.entry(model)?;
        for slot in &entry.slots {
            self.inner.send(Command::Pin { slot: *slot, pinned }).await?;
        }
        Ok(())
    }

    /// Changes the budget, to a number of bytes or a [`Preset`](crate::config::Preset). Idle models are evicted until it
    /// holds; running requests end undisturbed, and new loads wait. As when the pool is built, it is cut to what the machine
    /// has. Less than the pinned models hold is taken, too, with a warning: they stay, and nothing else is loaded.
    ///
    /// # Errors
    /// The budget is zero, or the pool is shutting down.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn set_budget(&self, budget: impl Into<Budget>) -> Result<(), Error> {
        let budget = match budget.into() {
            budget @ Budget::Of(_) => budget.bytes(None),
            budget @ Budget::Auto => {
                budget.bytes(self.inner.shared.memory().await.map(|memory| memory.total))
            }
        };
        if budget == Bytes::ZERO {
            return Err(Error::NoBudget);
        }
        self.inner.send(Command::Budget { budget }).await
    }

    /// Counts what a program on this machine holds into the budget, in place of what it held before: loads have that much less,
    /// and idle models are evicted for it. For an Ollama on the same machine, say.
    ///
    /// # Errors
    /// The pool is shutting down.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn set_outside(&self, who: &str, bytes: Bytes) -> Result<(), Error> {
        self.inner.send(Command::Outside { who: who.to_owned(), bytes }).await
    }

    /// The scheduler's view of this moment.
    ///
    /// # Errors
    /// The pool is shut down.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn status(&self) -> Result<PoolStatus, Error> {
        self.inner.ask(|reply| Command::Status { reply }).await
    }

    /// How the hosts of each model stand; models without hosts are left out.
    #[must_use]
    pub fn hosts(&self) -> Vec<(ModelName, Vec<HostState>)> {
        let slots = self.inner.shared.slots.iter();
        slots.filter_map(|slot| Some((slot.model.clone(), slot.backend.hosts()?.states()))).collect()
    }

    /// The pool's changes from now on.
    #[must_use]
    pub fn events(&self) -> PoolEvents {
        PoolEvents::new(self.inner.shared.events.subscribe())
    }

    /// The names of all models.
    pub fn models(&self) -> impl Iterator<Item = &ModelName> {
        self.inner.models.keys()
    }

    /// Ends the pool in order: nothing new is let in, requests in progress have `grace` to end, then everything is
    /// unloaded. Returns when all memory is back.
    ///
    /// # Cancel safety
    /// Dropping the future does not stop the shutdown.
    pub async fn shutdown(&self, grace: Duration) {
        // The only error is that the pool is gone already, which is what was asked for.
        let _ended = self.inner.ask(|reply| Command::Shutdown { grace, reply }).await;
    }
}

impl fmt::Debug for ModelPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelPool").field("models", &self.inner.models.keys()).finish_non_exhaustive()
    }
}

impl Inner {
    fn entry(&self, model: &str) -> Result<(&ModelName, &ModelEntry), Error> {
        let found = model.parse().ok().and_then(|name: ModelName| self.models.get_key_value(&name));
        found.ok_or_else(|| Error::UnknownModel {
            model: model.to_owned(),
            nearest: crate::nearest::nearest(model, self.models.keys().map(ModelName::as_str)),
        })
    }

    fn next_request(&self) -> RequestId {
        RequestId(self.next_request.fetch_add(1, Ordering::Relaxed))
    }

    /// When a request that may wait this long gives up.
    fn deadline(&self, wait: Option<Duration>) -> Instant {
        // A century stands for "however long": an Instant cannot hold every Duration.
        let wait = wait.unwrap_or(self.wait_timeout).min(Duration::from_hours(24 * 365 * 100));
        Instant::now() + wait
    }

    async fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).await.map_err(|_| Error::ShuttingDown)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| Error::ShuttingDown)
    }
}

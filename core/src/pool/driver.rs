use std::any::Any;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::events::PoolEvent;
use super::lease::{Lost, Returned, Wanted};
use super::sharing::Sharing;
use crate::backend::{HostChange, HostReport, LoadRequest, Model, Progress};
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::memory::{Estimate, Footprint, Freed, SystemMemory};
use crate::scheduler::{Ask, Chosen, Effect, Event, Limits, Plan, PoolStatus, RequestId, Scheduler, SlotId};
use crate::units::{Bytes, Timestamp};

/// What the pool's handles ask of the driver.
pub(super) enum Command {
    Request {
        id: RequestId,
        slot: SlotId,
        wanted: Wanted,
        reply: oneshot::Sender<Result<Granted, Error>>,
    },
    Unload {
        id: RequestId,
        slot: SlotId,
        reply: oneshot::Sender<Result<Bytes, Error>>,
    },
    Pin {
        slot: SlotId,
        pinned: bool,
    },
    Budget {
        budget: Bytes,
    },
    Outside {
        who: String,
        bytes: Bytes,
    },
    Limits {
        reply: oneshot::Sender<Limits>,
    },
    Status {
        reply: oneshot::Sender<PoolStatus>,
    },
    Plan {
        slots: Vec<SlotId>,
        sizes: BTreeMap<SlotId, Result<Estimate, Failure>>,
        reply: oneshot::Sender<Vec<Plan>>,
    },
    Shutdown {
        grace: Duration,
        reply: oneshot::Sender<()>,
    },
}

/// A slot's turn has come.
pub(super) struct Granted {
    pub(super) model: Arc<dyn Model>,
    pub(super) queued: Duration,
    pub(super) loading: Duration,
}

/// Owns the scheduler: feeds it what happens, and does what it says. The only place where the two meet a clock.
pub(super) struct Driver {
    scheduler: Scheduler,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    returns: mpsc::Receiver<Returned>,
    start: Instant,
    /// Estimates, loads, unloads and readings of the machine's memory under way; each ends with the event that tells of
    /// it.
    tasks: JoinSet<Ended>,
    monitor: Monitor,
    share: Option<Sharing>,
    /// What other processes have of a shared budget, and what programs on this machine that count into it hold.
    shared_out: Bytes,
    outside: BTreeMap<String, Bytes>,
    loads: BTreeMap<SlotId, CancellationToken>,
    waiting: BTreeMap<RequestId, oneshot::Sender<Result<Granted, Error>>>,
    unloading: BTreeMap<RequestId, oneshot::Sender<Result<Bytes, Error>>>,
    stopping: Vec<oneshot::Sender<()>>,
    abort_at: Option<Instant>,
    stopped: bool,
}

/// How a task of the driver's ended.
#[derive(Default)]
struct Ended {
    /// What it was for; nothing where it was only to look at the machine.
    event: Option<Event>,
    /// What it saw of the machine's memory on the way.
    memory: Option<SystemMemory>,
}

impl From<Event> for Ended {
    fn from(event: Event) -> Self {
        Self { event: Some(event), memory: None }
    }
}

/// When the machine's memory is looked at: now and then, and when the kernel says that programs wait for memory.
struct Monitor {
    interval: Duration,
    next: Instant,
    pressure: BoxStream<'static, ()>,
}

/// How often the machine's memory is looked at while somebody waits for it.
const WHILE_WAITING: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn new(
        scheduler: Scheduler,
        shared: Arc<Shared>,
        (commands, returns): (mpsc::Receiver<Command>, mpsc::Receiver<Returned>),
        monitor_interval: Duration,
        share: Option<Sharing>,
    ) -> Self {
        let pressure = shared.probe.pressure();
        Self {
            monitor: Monitor { interval: monitor_interval, next: Instant::now(), pressure },
            scheduler,
            share,
            shared_out: Bytes::ZERO,
            outside: BTreeMap::new(),
            shared,
            commands,
            returns,
            start: Instant::now(),
            tasks: JoinSet::new(),
            loads: BTreeMap::new(),
            waiting: BTreeMap::new(),
            unloading: BTreeMap::new(),
            stopping: Vec::new(),
            abort_at: None,
            stopped: false,
        }
    }

    pub(super) async fn run(mut self) {
        let mut open = true;
        while !self.stopped {
            let wake = [self.scheduler.poll_timeout().map(|at| self.start + at.since_start()), self.abort_at];
            let wake = wake.into_iter().flatten().min();
            let look = self.monitor.next;
            let look_at_others = self.share.as_ref().map(|share| share.next_look);
            tokio::select! {
                biased;
                Some(returned) = self.returns.recv() => self.on_return(returned),
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(ended) => self.on_ended(ended),
                    // Each task catches its own panics, and nothing aborts them.
                    Err(error) => tracing::error!(%error, "a task of the pool ended without its event"),
                },
                command = self.commands.recv(), if open => match command {
                    Some(command) => self.on_command(command),
                    None => {
                        open = false;
                        self.handle(Event::Shutdown);
                    }
                },
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => self.on_time(),
                () = tokio::time::sleep_until(look), if open => self.look(),
                () = tokio::time::sleep_until(look_at_others.unwrap_or_else(Instant::now)),
                    if open && look_at_others.is_some() => self.look_at_others(),
                Some(()) = self.monitor.pressure.next(), if open => self.look(),
                // The runtime is going down, and has taken the tasks with it: no event will come any more.
                else => break,
            }
        }
        for reply in self.stopping.drain(..) {
            // Nobody waits any more: fine, it is done.
            let _gone = reply.send(());
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            // Its caller left before it got here: there is nothing to load for.
            Command::Request { reply, .. } if reply.is_closed() => {}
            Command::Request { id, slot, wanted, reply } => {
                self.waiting.insert(id, reply);
                let Wanted { capability, priority, deadline, spare } = wanted;
                let deadline = Timestamp::new(deadline.saturating_duration_since(self.start));
                self.handle(Event::Request { id, slot, ask: Ask { capability, priority, deadline, spare } });
            }
            Command::Unload { id, slot, reply } => {
                self.unloading.insert(id, reply);
                self.handle(Event::Unload { id, slot });
            }
            Command::Pin { slot, pinned } => {
                self.handle(Event::Pin { slot, pinned });
                self.check_pinned();
            }
            Command::Budget { budget } => {
                let budget = self.shared.capped(budget);
                self.handle(Event::Budget { budget });
                let status = self.scheduler.status(self.now());
                self.shared.metrics.set_ledger(status.budget, status.limit, status.used, status.left);
                self.check_pinned();
            }
            Command::Outside { who, bytes } => {
                if self.outside.insert(who, bytes) != Some(bytes) {
                    self.handle(Event::Others { taken: self.taken() });
                }
            }
            Command::Limits { reply } => drop(reply.send(self.scheduler.limits())),
            Command::Status { reply } => drop(reply.send(self.scheduler.status(self.now()))),
            Command::Plan { slots, sizes, reply } => {
                let size = |slot: SlotId| {
                    let unknown = || Failure::new(FailureKind::Engine, "its size was not asked for");
                    sizes.get(&slot).cloned().unwrap_or_else(|| Err(unknown()))
                };
                drop(reply.send(self.scheduler.plan(&slots, &size, self.now())));
            }
            Command::Shutdown { grace, reply } => {
                self.stopping.push(reply);
                self.abort_at = Some(Instant::now() + grace.min(Duration::from_hours(24 * 365)));
                self.handle(Event::Shutdown);
            }
        }
    }

    /// Says so where the pinned models hold more than the budget: nobody is evicted for it.
    fn check_pinned(&self) {
        let (pinned, Limits { budget, .. }) = (self.scheduler.pinned(), self.scheduler.limits());
        if pinned > budget {
            let status = self.scheduler.status(self.now());
            let models: Vec<&str> = (status.slots.iter())
                .filter(|slot| slot.pinned && slot.reserved > Bytes::ZERO)
                .map(|slot| slot.model.as_str())
                .collect();
            tracing::warn!(
                %pinned, %budget, ?models,
                "the pinned models hold more than the budget: they stay, and nothing else is loaded"
            );
        }
    }

    /// Looks at the machine's memory, off this thread: the kernel may take its time.
    fn look(&mut self) {
        self.monitor.next = Instant::now() + self.monitor.interval;
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move { Ended { event: None, memory: shared.memory().await } });
    }

    fn look_at_others(&mut self) {
        if let Some(others) = self.share.as_mut().and_then(Sharing::look) {
            self.shared_out = others.taken();
            self.handle(Event::Others { taken: self.taken() });
        }
    }

    /// What of the budget is others'.
    fn taken(&self) -> Bytes {
        self.shared_out + self.outside.values().copied().sum()
    }

    fn on_ended(&mut self, Ended { event, memory }: Ended) {
        if let Some(memory) = memory {
            self.on_memory(memory);
        }
        if let Some(event) = event {
            self.handle(event);
        }
    }

    fn on_memory(&mut self, memory: SystemMemory) {
        self.shared.metrics.on_memory(&memory);
        for slot in (0..self.shared.slots.len()).map(SlotId) {
            self.measure(slot);
        }
        let before = self.scheduler.pressed();
        self.handle(Event::Memory { attainable: memory.attainable() });
        if self.scheduler.pressed() && !before {
            let status = self.scheduler.status(self.now());
            tracing::warn!(
                held = status.used.0,
                budget = status.budget.0,
                available = memory.available.0,
                limit = status.limit.0,
                "the machine is short of memory: idle models are unloaded"
            );
        }
    }

    /// Looks again at what a ready model holds, and says so where that is something else than before.
    fn measure(&mut self, slot: SlotId) {
        let model = self.shared.ready.get(&slot).map(|model| Arc::clone(&model));
        let measured = model.and_then(|model| measured(|| model.memory_at_load()));
        if let Some(footprint) = measured.filter(|_| measured != self.scheduler.measured(slot)) {
            self.handle(Event::Measured { slot, footprint });
        }
    }

    fn on_return(&mut self, Returned { id, slot, lost }: Returned) {
        // Its steps may have touched buffers for the first time.
        self.measure(slot);
        if let Some(Lost { slot, cause }) = lost {
            tracing::error!(model = %self.shared.slots[slot.0].model, %cause, "a loaded model is gone");
            self.handle(Event::Lost { slot, cause });
        }
        self.handle(Event::Return { id });
    }

    fn on_time(&mut self) {
        if self.abort_at.is_some_and(|at| at <= Instant::now()) {
            self.abort_at = None;
            self.handle(Event::Abort);
        } else {
            self.handle(Event::Tick);
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::new(self.start.elapsed())
    }

    /// Tells the scheduler what happened and carries out what it wants done.
    fn handle(&mut self, event: Event) {
        let now = self.now();
        if let Event::Return { id } = &event {
            self.waiting.remove(id);
        }
        self.scheduler.handle(event, now);
        while let Some(effect) = self.scheduler.poll_effect() {
            if let Some(event) = self.carry_out(effect) {
                self.scheduler.handle(event, now);
            }
        }
        if let Some(share) = &mut self.share {
            let (_, used) = self.scheduler.budget_and_used();
            share.state(used, self.scheduler.wanted());
        }
        if self.scheduler.waits_for_memory() {
            self.monitor.next = self.monitor.next.min(Instant::now() + WHILE_WAITING);
        }
        let (waiting, oldest) = self.scheduler.waiting(now);
        self.shared.metrics.on_queue(waiting, oldest);
    }

    /// Does what the scheduler decided. What it brings about at once comes back as an event.
    fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Estimate { slot, left, taken } => self.estimate(slot, left, taken),
            Effect::StartLoad { slot, estimate } => {
                // What takes no room needs none of the others', also while this process holds more than it has written down.
                let taken = (estimate.at_load() > Bytes::ZERO).then(|| self.room_is_taken(slot)).flatten();
                if taken.is_some() {
                    return taken;
                }
                self.load(slot, estimate);
            }
            Effect::CancelLoad { slot } => {
                if let Some(cancel) = self.loads.get(&slot) {
                    cancel.cancel();
                }
            }
            Effect::Resize { slot, estimate, grows } => {
                let taken = grows.then(|| self.room_is_taken(slot)).flatten();
                if taken.is_some() {
                    return taken;
                }
                self.resize(slot, estimate.n_ctx);
            }
            Effect::StartUnload { slot } => self.unload(slot),
            Effect::Grant { id, slot, queued, loading } => {
                let model = self.shared.ready.get(&slot).map(|model| Arc::clone(&model));
                let sent = match (self.waiting.remove(&id), model) {
                    (Some(reply), Some(model)) => reply.send(Ok(Granted { model, queued, loading })).is_ok(),
                    _ => false,
                };
                // Its caller left while the grant was on its way.
                return (!sent).then_some(Event::Return { id });
            }
            Effect::Reject { id, error } => {
                if let Some(reply) = self.waiting.remove(&id) {
                    self.shared.metrics.on_reject(&error);
                    drop(reply.send(Err(error)));
                }
            }
            Effect::UnloadDone { id, result } => {
                if let Some(reply) = self.unloading.remove(&id) {
                    drop(reply.send(result));
                }
            }
            Effect::Chosen(chosen) => log_chosen(&chosen),
            Effect::Settled(change) => self.shared.metrics.on_settled(&change),
            Effect::Changed(change) => {
                self.shared.metrics.on_change(&change);
                tracing::debug!(
                    model = %change.model, from = change.from.as_str(), to = change.to.as_str(),
                    cause = ?change.cause, bytes = change.bytes.0, used = change.used.0, limit = change.limit.0,
                    "slot changed"
                );
                self.shared.emit(PoolEvent::Slot(change));
            }
            Effect::Stopped => self.stopped = true,
        }
        None
    }

    /// What to tell the scheduler where other processes leave no room for what it holds now, for a slot's sake.
    fn room_is_taken(&mut self, slot: SlotId) -> Option<Event> {
        let outside: Bytes = self.outside.values().copied().sum();
        let share = self.share.as_mut()?;
        let (budget, used) = self.scheduler.budget_and_used();
        self.shared_out = share.hold(used, budget.saturating_sub(outside)).err()?.taken();
        Some(Event::Taken { slot, taken: self.taken() })
    }

    fn estimate(&mut self, slot: SlotId, left: Bytes, taken: Bytes) {
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let memory = shared.memory().await;
            let has = memory.map_or(left, |memory| memory.attainable().saturating_sub(taken));
            let (short, left) = (has < left, left.min(has));
            let result = no_panic(shared.estimate(slot, left)).await;
            Ended { event: Some(Event::Estimated { slot, left, short, result }), memory }
        });
    }

    fn load(&mut self, slot: SlotId, estimate: Estimate) {
        let cancel = CancellationToken::new();
        self.loads.insert(slot, cancel.clone());
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let (progress, hosts) = (shared.progress(slot), shared.host_report(slot));
            let request = LoadRequest { estimate, cancel, progress, hosts };
            let result = no_panic(shared.slots[slot.0].backend.load(request)).await;
            let result = result.map(|model| {
                let measured = measured(|| model.memory_at_load());
                shared.ready.insert(slot, model);
                measured
            });
            Event::Loaded { slot, result }.into()
        });
    }

    fn resize(&mut self, slot: SlotId, n_ctx: Option<u32>) {
        let model = self.shared.ready.get(&slot).map(|model| Arc::clone(&model));
        self.tasks.spawn(async move {
            let gone = || Failure::new(FailureKind::EngineGone, "there is no model to resize");
            let result = match (model, n_ctx) {
                (Some(model), Some(n_ctx)) => {
                    let resized = no_panic(model.resize(n_ctx)).await;
                    resized.map(|()| measured(|| model.memory_at_load()))
                }
                _ => Err(gone()),
            };
            Event::Resized { slot, result }.into()
        });
    }

    fn unload(&mut self, slot: SlotId) {
        self.loads.remove(&slot);
        let model = self.shared.ready.remove(&slot).map(|(_, model)| model);
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            if let Some(model) = model {
                match no_panic(async { Ok(model.unload().await) }).await {
                    Ok(freed) => shared.check_freed(slot, freed),
                    Err(failure) => tracing::error!(%failure, "unload failed"),
                }
            }
            Event::Unloaded { slot }.into()
        });
    }
}

impl Shared {
    /// What a load of a slot would take, with so many bytes left for it.
    pub(super) async fn estimate(&self, slot: SlotId, left: Bytes) -> Result<Estimate, Failure> {
        self.slots[slot.0].backend.estimate(left).await
    }

    /// Says so where an unload did not give back what the model held.
    fn check_freed(&self, slot: SlotId, freed: Option<Freed>) {
        let Some(Freed { held, returned: back }) = freed else { return };
        if let Some(missing) = freed.and_then(|freed| freed.shortfall()) {
            let model = &self.slots[slot.0].model;
            tracing::warn!(%model, %held, returned = %back, %missing, "an unload did not give all memory back");
            self.metrics.on_shortfall(slot, missing);
        }
    }

    /// The machine's memory now, read where nobody waits for it; `None` where the platform does not tell.
    pub(super) async fn memory(&self) -> Option<SystemMemory> {
        let probe = Arc::clone(&self.probe);
        tokio::task::spawn_blocking(move || probe.read()).await.ok().flatten()
    }

    /// A budget, or what this process can ever have where that is less.
    pub(super) fn capped(&self, budget: Bytes) -> Bytes {
        capped(budget, self.most)
    }

    /// Announces a load's progress, each percent once.
    fn progress(self: &Arc<Self>, slot: SlotId) -> Progress {
        let shared = Arc::clone(self);
        let announced = AtomicU32::new(u32::MAX);
        Arc::new(move |fraction: f32| {
            let percent = (fraction.clamp(0.0, 1.0) * 100.0) as u32;
            if announced.swap(percent, Ordering::Relaxed) != percent {
                let model = shared.slots[slot.0].model.clone();
                shared.emit(PoolEvent::LoadProgress { model, percent });
            }
        })
    }

    /// Announces what becomes of a slot's hosts. What outlives the pool has nobody to tell.
    fn host_report(self: &Arc<Self>, slot: SlotId) -> HostReport {
        let shared = Arc::downgrade(self);
        Arc::new(move |change: HostChange| {
            let Some(shared) = shared.upgrade() else { return };
            let model = shared.slots[slot.0].model.clone();
            let HostChange { host, breaker, cause } = change;
            let cause_text = cause.as_deref().unwrap_or("");
            tracing::warn!(%model, %host, breaker = breaker.as_str(), cause = cause_text, "a host's breaker moved");
            shared.metrics.on_breaker(&model, &host, breaker);
            shared.emit(PoolEvent::Breaker { model, host, breaker, cause });
        })
    }

    pub(super) fn emit(&self, event: PoolEvent) {
        // No subscriber: nobody wants to know.
        let _nobody = self.events.send(event);
    }
}

/// A budget, or what this process can ever have where that is less.
pub(super) fn capped(budget: Bytes, most: Option<Bytes>) -> Bytes {
    let Some(most) = most.filter(|most| *most < budget) else { return budget };
    tracing::warn!(
        budget = %budget, possible = %most,
        "the budget is more than this process can have: models may hold what is possible"
    );
    most
}

/// Says who gives memory back, and what that was decided by.
fn log_chosen(chosen: &Chosen) {
    let Chosen { model, cause, idle, bytes, load, uses, score, used, limit } = chosen;
    let cause = cause.as_str();
    tracing::info!(%model, cause, ?idle, %bytes, ?load, uses, score, %used, %limit, "a model gives memory back");
}

/// What a model says that it holds. A panic of its backend's there is as good as no figure.
pub(super) fn measured(measure: impl FnOnce() -> Option<Footprint>) -> Option<Footprint> {
    std::panic::catch_unwind(AssertUnwindSafe(measure)).unwrap_or_else(|panic| {
        tracing::error!(panic = panic_text(&*panic), "a model's memory could not be measured");
        None
    })
}

/// A backend's panic is its failure, not the pool's end.
async fn no_panic<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(result) => result,
        Err(panic) => Err(Failure::new(FailureKind::Engine, format!("panicked: {}", panic_text(&*panic)))),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

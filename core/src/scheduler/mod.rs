//! Decides which models are loaded and who may use them, and does nothing else.
//!
//! A state machine without clock, thread, network or disk: [`Scheduler::handle`] takes an event and the time it
//! happened, [`Scheduler::poll_effect`] gives what has to be done about it, [`Scheduler::poll_timeout`] says when to
//! come back without an event. Whoever drives it carries the effects out and reports their ends as events.

mod dispatch;
mod dry_run;
mod policy;
mod queue;
mod slot;
mod status;

pub use dry_run::{Plan, PlannedLoad};
pub use policy::{Candidate, Choice, Eviction, HALF_LIFE, Need, Together, choose};
pub use slot::{Cause, Change, Chosen, Phase};
pub use status::{PoolStatus, SlotStatus};

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::answer::Priority;
use crate::config::Class;
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::memory::{Estimate, Footprint, Ledger};
use crate::request::{Capabilities, Capability};
use crate::units::{Bytes, ModelName, Timestamp};
use queue::{Queue, Waiting};
use slot::{Backoff, Held, Slot, State, Took};

/// A place where one model can run, by number: the order in which slots were given to [`Scheduler::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub usize);

/// A request, by a number that its sender chose and never uses again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What the scheduler knows of a slot.
#[derive(Clone, Debug)]
pub struct SlotSpec {
    /// The logical model. Slots of one model count as one LLM.
    pub model: ModelName,
    /// Whether it counts for `max_concurrent_llms`.
    pub llm: bool,
    /// How hard to hold on to it. Residents are pinned from the start.
    pub class: Class,
    /// What it can be asked for.
    pub capabilities: Capabilities,
    /// Requests that may run on it at once; at least 1.
    pub parallel: usize,
    /// Unloaded after this long without a request.
    pub ttl: Option<Duration>,
}

/// The limits that hold at every moment.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// All that may be held for models.
    pub budget: Bytes,
    /// What of the budget is not given out: the process holds a little for models besides them.
    pub spare: Bytes,
    /// Memory of the machine that is left to others, and to what this process holds besides models.
    pub reserve: Bytes,
    /// Who is evicted first.
    pub eviction: Eviction,
    /// LLMs that may be loaded or loading at once.
    pub max_concurrent_llms: usize,
    /// Requests that may wait at once.
    pub max_waiting: usize,
    /// A waiting request moves up one priority class each time this passes.
    pub aging: Duration,
    /// A request that has waited this long for room stops new requests on the models it needs out of the way.
    pub drain_after: Duration,
}

/// 6 GB (the preset `medium`), nothing left to others, 3 LLMs, 256 waiting requests.
impl Default for Limits {
    fn default() -> Self {
        Self {
            budget: Bytes(6_000_000_000),
            spare: Bytes::ZERO,
            reserve: Bytes::ZERO,
            eviction: Eviction::default(),
            max_concurrent_llms: 3,
            max_waiting: 256,
            aging: Duration::from_secs(30),
            drain_after: Duration::from_secs(10),
        }
    }
}

impl Limits {
    /// The part of the budget that is kept as spare, and its bound. 30 to 55 MB of llama.cpp's own code, stacks of threads and
    /// what allocators keep stayed with a process after hundreds of loads of six models (`cargo bench --bench soak`). A
    /// small budget, which is for small models, keeps less.
    const SPARE_PART: u64 = 64;
    const MOST_SPARE: Bytes = Bytes(64_000_000);

    /// The same with as much of the budget spare as models of real sizes need.
    #[must_use]
    pub fn with_spare(self) -> Self {
        Self { spare: Bytes(self.budget.0 / Self::SPARE_PART).min(Self::MOST_SPARE), ..self }
    }

    /// The same with another budget, and as much of that spare where any is.
    #[must_use]
    pub fn with_budget(self, budget: Bytes) -> Self {
        let limits = Self { budget, ..self };
        if self.spare > Bytes::ZERO { limits.with_spare() } else { limits }
    }
}

/// What a request asks for, and how urgently. Requests of equal urgency are served in the order of their arrival.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// What will be asked of the model.
    pub capability: Capability,
    /// How urgent it is.
    pub priority: Priority,
    /// When it gives up waiting.
    pub deadline: Timestamp,
    /// Models that were used within this time are no victims for it: it is only a guess at what may be wanted.
    pub spare: Option<Duration>,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Someone wants to use a slot. Answered by one [`Effect::Grant`] or [`Effect::Reject`].
    Request {
        /// Its number.
        id: RequestId,
        /// The slot.
        slot: SlotId,
        /// The rest.
        ask: Ask,
    },
    /// A request ended: its caller went away while it waited, or its use of the slot is over. Unknown numbers are
    /// ignored, so that a caller need not know which of the two it was.
    Return {
        /// Its number.
        id: RequestId,
    },
    /// An [`Effect::Estimate`] ended.
    Estimated {
        /// The slot.
        slot: SlotId,
        /// For how much room: what the effect said, or what the machine had left where that was less.
        left: Bytes,
        /// Whether the machine had less.
        short: bool,
        /// What it found.
        result: Result<Estimate, Failure>,
    },
    /// An [`Effect::StartLoad`] ended.
    Loaded {
        /// The slot.
        slot: SlotId,
        /// What the model holds now, where that could be measured.
        result: Result<Option<Footprint>, Failure>,
    },
    /// An [`Effect::Resize`] ended.
    Resized {
        /// The slot.
        slot: SlotId,
        /// What the model holds now, where that could be measured. After a failure it is of no use any more.
        result: Result<Option<Footprint>, Failure>,
    },
    /// A ready model was looked at again: its steps may have touched buffers for the first time, and what loads that ran side
    /// by side took may have been shared out by now.
    Measured {
        /// The slot.
        slot: SlotId,
        /// What it holds.
        footprint: Footprint,
    },
    /// A loaded model turned out to be gone: its thread or process has ended. What is left of it is unloaded.
    Lost {
        /// The slot.
        slot: SlotId,
        /// What told so.
        cause: Failure,
    },
    /// An [`Effect::StartUnload`] ended: the memory is back.
    Unloaded {
        /// The slot.
        slot: SlotId,
    },
    /// Someone wants a slot's memory back. Answered by one [`Effect::UnloadDone`].
    Unload {
        /// Its number, among unloads.
        id: RequestId,
        /// The slot.
        slot: SlotId,
    },
    /// A slot may not be evicted any more, or may be again.
    Pin {
        /// The slot.
        slot: SlotId,
        /// Whether it is pinned from now on.
        pinned: bool,
    },
    /// The budget changed. Idle models are evicted until it holds; running requests end undisturbed.
    Budget {
        /// The new budget.
        budget: Bytes,
    },
    /// The machine's memory was looked at. While it has less than the budget says, loads have that much; where models
    /// hold more than that, idle ones are evicted.
    Memory {
        /// What this process could hold now, its own anonymous memory included:
        /// [`SystemMemory::attainable`](crate::memory::SystemMemory::attainable).
        attainable: Bytes,
    },
    /// It was looked at what other processes have of a budget that they share with this one. Loads have the rest; where
    /// models hold more than that, idle ones are evicted.
    Others {
        /// What they hold, and what they wait for whose turn is before this process's.
        taken: Bytes,
    },
    /// An [`Effect::StartLoad`], or an [`Effect::Resize`] to a longer context, was not begun: another process had taken the
    /// room first.
    Taken {
        /// The slot.
        slot: SlotId,
        /// As in [`Event::Others`].
        taken: Bytes,
    },
    /// Time passed.
    Tick,
    /// No new requests; everything is unloaded as soon as it is idle.
    Shutdown,
    /// The grace of a shutdown is over: what is still in use is unloaded too.
    Abort,
}

/// What has to be done.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Find out what a load of the slot will take, with so many bytes left for it.
    Estimate {
        /// The slot.
        slot: SlotId,
        /// What is left of the budget.
        left: Bytes,
        /// What of the memory that this process could hold is spoken for: by models, and the reserve.
        taken: Bytes,
    },
    /// Load the slot; its bytes are reserved.
    StartLoad {
        /// The slot.
        slot: SlotId,
        /// What is reserved.
        estimate: Estimate,
    },
    /// Stop a load that nobody wants any more. It still ends with [`Event::Loaded`].
    CancelLoad {
        /// The slot.
        slot: SlotId,
    },
    /// Give the slot, which nobody uses, another context; what its estimate says of everything else stays.
    Resize {
        /// The slot.
        slot: SlotId,
        /// What it is to become.
        estimate: Estimate,
        /// Whether it takes room for that, which is reserved. A change that gives room back cannot be refused.
        grows: bool,
    },
    /// Unload the slot.
    StartUnload {
        /// The slot.
        slot: SlotId,
    },
    /// The request may use the slot until it is returned.
    Grant {
        /// Its number.
        id: RequestId,
        /// The slot.
        slot: SlotId,
        /// Time it waited, loading excepted.
        queued: Duration,
        /// Time it waited for the slot's load.
        loading: Duration,
    },
    /// The request will not be served.
    Reject {
        /// Its number.
        id: RequestId,
        /// Why.
        error: Error,
    },
    /// An [`Event::Unload`] ended.
    UnloadDone {
        /// Its number.
        id: RequestId,
        /// The bytes that came back; zero if it was not loaded.
        result: Result<Bytes, Error>,
    },
    /// A model was chosen to give memory back, to be told; what has to be done for it follows.
    Chosen(Chosen),
    /// A slot changed its state.
    Changed(Change),
    /// The ledger holds more for a slot than before, whose state is the same.
    Settled(Change),
    /// Everything is unloaded after [`Event::Shutdown`].
    Stopped,
}

/// The state machine. See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    slots: Vec<Slot>,
    ledger: Ledger,
    queue: Queue,
    leases: BTreeMap<RequestId, SlotId>,
    effects: VecDeque<Effect>,
    shutdown: Shutdown,
    /// What this process could hold by the last reading that differed much from the one before.
    attainable: Option<Bytes>,
    /// Whether models hold so much that idle ones have to go until they are below the ceiling.
    pressed: bool,
    /// See [`Scheduler::wanted`].
    wanted: Bytes,
    /// When the first of those who would be victims, but were loaded again only now, becomes one.
    stays_until: Option<Timestamp>,
    /// Requests that were let in so far.
    grants: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shutdown {
    No,
    WhenIdle,
    Now,
    Done,
}

/// A reading of the machine's memory that differs from the last one by less than this part of it, and by less than this part
/// of the reserve, changes nothing, so that nobody runs after every page.
const STEADY: u64 = 64;
const STEADY_RESERVE: u64 = 8;

/// A context that was made shorter stays so for this long, so that it does not change with every request.
const STAYS_SHORT: Duration = Duration::from_mins(1);

/// First pause after a failed load.
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
/// Longest pause after failed loads.
const BACKOFF_LONGEST: Duration = Duration::from_mins(5);

impl Scheduler {
    /// A scheduler over `slots`, none of them loaded.
    #[must_use]
    pub fn new(limits: Limits, slots: Vec<SlotSpec>) -> Self {
        let mut ledger = Ledger::new(limits.budget);
        ledger.set_spare(limits.spare);
        Self {
            limits,
            slots: slots.into_iter().map(Slot::new).collect(),
            ledger,
            queue: Queue::default(),
            leases: BTreeMap::new(),
            effects: VecDeque::new(),
            shutdown: Shutdown::No,
            attainable: None,
            pressed: false,
            wanted: Bytes::ZERO,
            stays_until: None,
            grants: 0,
        }
    }

    /// Takes in what happened at `now`. Events must come in the order of their times.
    pub fn handle(&mut self, event: Event, now: Timestamp) {
        match event {
            Event::Request { id, slot, ask } => self.on_request(id, slot, ask, now),
            Event::Return { id } => self.on_return(id, now),
            Event::Estimated { slot, left, short, result } => {
                if short {
                    self.on_short(left);
                }
                self.on_estimated(slot, left, result, now);
            }
            Event::Loaded { slot, result } => self.on_loaded(slot, result, now),
            Event::Resized { slot, result } => self.on_resized(slot, result, now),
            Event::Measured { slot, footprint } => self.on_measured(slot, footprint, now),
            Event::Lost { slot, cause } => self.on_lost(slot, cause, now),
            Event::Unloaded { slot } => self.on_unloaded(slot, now),
            Event::Unload { id, slot } => self.on_unload(id, slot, now),
            Event::Pin { slot, pinned } => self.slots[slot.0].pinned = pinned,
            Event::Budget { budget } => {
                self.limits = self.limits.with_budget(budget);
                self.ledger.set_budget(budget);
                self.ledger.set_spare(self.limits.spare);
            }
            Event::Memory { attainable } => self.on_memory(attainable),
            Event::Others { taken } => self.ledger.set_others(taken),
            Event::Taken { slot, taken } => self.on_taken(slot, taken, now),
            Event::Tick => {}
            Event::Shutdown => self.on_shutdown(Shutdown::WhenIdle, now),
            Event::Abort => self.on_shutdown(Shutdown::Now, now),
        }
        self.expire(now);
        self.dispatch(now);
        self.finish_shutdown(now);
    }

    /// The next thing to do, until there is none.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Event::Tick`] is due, if nothing else happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let deadline = self.queue.earliest_deadline();
        // A slot that someone waits for does not expire.
        let unwanted = |slot: &SlotId| !self.queue.waits_for(*slot);
        let slots = (0..self.slots.len()).map(SlotId).filter(unwanted);
        let ttl = slots.filter_map(|slot| self.slots[slot.0].expires_at()).min();
        [deadline, ttl, self.stays_until].into_iter().flatten().min()
    }

    fn on_request(&mut self, id: RequestId, slot: SlotId, ask: Ask, now: Timestamp) {
        if self.shutdown != Shutdown::No {
            return self.reject(id, Error::ShuttingDown);
        }
        let spec = &self.slots[slot.0].spec;
        if !spec.capabilities.has(ask.capability) {
            let error = Error::Unsupported { model: spec.model.clone(), capability: ask.capability };
            return self.reject(id, error);
        }
        if let Some(error) = self.slots[slot.0].backoff_error(now) {
            return self.reject(id, error);
        }
        self.queue.push(Waiting { id, slot, ask, arrived: now });
        self.dispatch(now);
        if self.queue.len() > self.limits.max_waiting
            && let Some(rejected) = self.queue.remove(id)
        {
            self.reject(id, Error::QueueFull { waiting: self.queue.len() });
            self.after_waiter_left(rejected.slot, now);
        }
    }

    /// The machine has left only so much, also where the last reading was taken for as good as the one before: until the
    /// next one, nobody is told more. Else a load that waits would be sized again and again for room that is not there.
    fn on_short(&mut self, left: Bytes) {
        if left < self.ledger.left() {
            self.ledger.set_ceiling(Some(self.ledger.used() + left));
            self.attainable = None;
        }
    }

    /// Eviction begins when half of the reserve is used up, and ends when all of it is there again.
    fn on_memory(&mut self, attainable: Bytes) {
        let reserve = self.limits.reserve;
        let steady = |last: Bytes| {
            last.0.abs_diff(attainable.0) < last.0.div_ceil(STEADY).min(reserve.0 / STEADY_RESERVE)
        };
        if self.attainable.is_some_and(steady) {
            return;
        }
        self.attainable = Some(attainable);
        self.ledger.set_ceiling(Some(attainable.saturating_sub(reserve)));
        self.pressed |= self.held_in_the_end() > attainable.saturating_sub(Bytes(reserve.0 / 2));
    }

    /// What waits for room goes on waiting.
    fn on_taken(&mut self, slot: SlotId, taken: Bytes, now: Timestamp) {
        self.ledger.set_others(taken);
        match self.slots[slot.0].take_state() {
            State::Loading { held, .. } => {
                self.ledger.release(held.reservation);
                let state = State::Sized { estimate: held.estimate, left: self.ledger.left() };
                self.set_state(slot, state, Cause::Taken, now);
                self.answer_unloads(slot, Bytes::ZERO);
                if !self.queue.waits_for(slot) {
                    self.set_state(slot, State::Absent, Cause::Abandoned, now);
                }
            }
            // One that becomes shorter takes nothing, and goes on.
            State::Resizing { held, to, becomes, idle_since } if to.saves(&held.estimate) > Bytes::ZERO => {
                self.ledger.settle(&held.reservation, becomes.saturating_sub(to.saves(&held.estimate)));
                self.slots[slot.0].shortened = Some(now);
                let ready = State::Ready { held, leases: 0, idle_since, lost: None };
                self.set_state(slot, ready, Cause::Taken, now);
                self.unload_if_asked(slot, now);
            }
            other => self.slots[slot.0].state = other,
        }
    }

    /// The limits as they are now.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What is known of a ready slot's memory.
    #[must_use]
    pub fn measured(&self, slot: SlotId) -> Option<Footprint> {
        self.slots.get(slot.0)?.state.held()?.measured
    }

    /// What the pinned models hold that would be free without them.
    #[must_use]
    pub fn pinned(&self) -> Bytes {
        let pinned = self.slots.iter().filter(|slot| slot.pinned);
        self.ledger.frees(pinned.filter_map(|slot| slot.state.held()).map(|held| &held.reservation))
    }

    /// The budget, and what of it the ledger holds.
    #[must_use]
    pub fn budget_and_used(&self) -> (Bytes, Bytes) {
        (self.ledger.budget(), self.ledger.used())
    }

    /// What the most urgent load that waits for room would hold besides what models hold here now.
    #[must_use]
    pub fn wanted(&self) -> Bytes {
        self.wanted
    }

    /// Whether models hold more than the machine has memory for, so that idle ones go.
    #[must_use]
    pub fn pressed(&self) -> bool {
        self.pressed
    }

    /// Whether somebody waits while the machine has less memory than the budget says.
    #[must_use]
    pub fn waits_for_memory(&self) -> bool {
        self.queue.len() > 0 && self.ledger.ceiling().is_some()
    }

    fn on_return(&mut self, id: RequestId, now: Timestamp) {
        if let Some(waiting) = self.queue.remove(id) {
            self.after_waiter_left(waiting.slot, now);
        } else if let Some(slot) = self.leases.remove(&id)
            && let State::Ready { leases, idle_since, .. } = &mut self.slots[slot.0].state
        {
            *leases -= 1;
            *idle_since = now;
            self.unload_if_lost(slot, now);
        }
    }

    fn on_lost(&mut self, slot: SlotId, cause: Failure, now: Timestamp) {
        if let State::Ready { lost, .. } = &mut self.slots[slot.0].state {
            *lost = Some(cause);
            self.unload_if_lost(slot, now);
        }
    }

    fn unload_if_lost(&mut self, slot: SlotId, now: Timestamp) {
        if let State::Ready { leases: 0, lost: Some(cause), .. } = &self.slots[slot.0].state {
            let cause = cause.clone();
            self.back_off(slot, &cause, now);
            self.start_unload(slot, Cause::Failed, now);
        }
    }

    fn on_estimated(&mut self, slot: SlotId, left: Bytes, result: Result<Estimate, Failure>, now: Timestamp) {
        let State::Estimating { .. } = self.slots[slot.0].state else { return };
        match result {
            Ok(estimate) if self.queue.waits_for(slot) => {
                let estimate = self.slots[slot.0].at_least_what_it_took(estimate, now);
                self.set_state(slot, State::Sized { estimate, left }, Cause::Request, now);
            }
            Ok(_) => self.set_state(slot, State::Absent, Cause::Abandoned, now),
            Err(cause) => {
                self.set_state(slot, State::Absent, Cause::Failed, now);
                self.reject_waiters(slot, &|model| Error::Load { model, cause: cause.clone() });
            }
        }
    }

    fn on_loaded(&mut self, slot: SlotId, result: Result<Option<Footprint>, Failure>, now: Timestamp) {
        let (held, started, cancelled) = match self.slots[slot.0].take_state() {
            State::Loading { held, started, cancelled } => (held, started, cancelled),
            other => return self.slots[slot.0].state = other,
        };
        match result {
            Ok(measured) => {
                // A file-backed page that has not been touched yet is not resident but will be: the larger of the
                // two figures is what the model may come to hold.
                let reserved = held.estimate.reserve();
                let total = measured.and_then(|measured| measured.total());
                let bytes = total.map_or(reserved, |total| total.max(reserved));
                self.ledger.settle(&held.reservation, bytes);
                let entry = &mut self.slots[slot.0];
                entry.failures = 0;
                entry.took = took(&held.estimate, measured, now);
                entry.backoff = None;
                entry.last_load = Some((started, now));
                let held = Held { measured, ..held };
                let ready = State::Ready { held, leases: 0, idle_since: now, lost: None };
                self.set_state(slot, ready, Cause::Request, now);
                self.unload_if_asked(slot, now);
                self.unload_if_over_budget(slot, now);
            }
            Err(cause) => {
                self.ledger.release(held.reservation);
                let abandoned = cancelled && cause.kind == FailureKind::Cancelled;
                let why = if abandoned { Cause::Abandoned } else { Cause::Failed };
                self.set_state(slot, State::Absent, why, now);
                self.answer_unloads(slot, Bytes::ZERO);
                // Whoever joined a load that was being given up gets a new one from the next dispatch.
                if !abandoned {
                    self.back_off(slot, &cause, now);
                    self.reject_waiters(slot, &|model| Error::Load { model, cause: cause.clone() });
                }
            }
        }
    }

    /// The ledger keeps the larger figure here, too: what a model was reserved for, it may yet come to hold.
    fn on_measured(&mut self, slot: SlotId, footprint: Footprint, now: Timestamp) {
        let entry = &mut self.slots[slot.0];
        let State::Ready { held, lost: None, .. } = &mut entry.state else { return };
        if held.measured == Some(footprint) {
            return;
        }
        held.measured = Some(footprint);
        if let Some(more) = took(&held.estimate, held.measured, now) {
            entry.took = Some(more);
        }
        let holds = self.ledger.bytes(&held.reservation);
        if let Some(total) = footprint.total().filter(|total| *total > holds) {
            self.ledger.settle(&held.reservation, total);
        }
        let change = self.change(slot, Phase::Ready, Cause::Measured, now);
        self.effects.push_back(Effect::Settled(change));
    }

    fn on_resized(&mut self, slot: SlotId, result: Result<Option<Footprint>, Failure>, now: Timestamp) {
        let (mut held, to, becomes, idle_since) = match self.slots[slot.0].take_state() {
            State::Resizing { held, to, becomes, idle_since } => (held, *to, becomes, idle_since),
            other => return self.slots[slot.0].state = other,
        };
        self.slots[slot.0].last_resize = Some(now.since(self.slots[slot.0].since));
        match result {
            Ok(measured) => {
                let total = measured.and_then(|measured| measured.total());
                self.ledger.settle(&held.reservation, total.map_or(becomes, |total| total.max(becomes)));
                let shorter = held.estimate.saves(&to) > Bytes::ZERO;
                let whole = held.whole.take().unwrap_or_else(|| Box::new(held.estimate));
                let whole = (whole.n_ctx != to.n_ctx).then_some(whole);
                let held = Held { estimate: to, measured, whole, ..held };
                self.slots[slot.0].shortened = Some(now).filter(|_| shorter);
                let cause = if shorter { Cause::Shortened } else { Cause::Lengthened };
                self.set_state(slot, State::Ready { held, leases: 0, idle_since, lost: None }, cause, now);
                self.unload_if_asked(slot, now);
            }
            Err(cause) => {
                let ready = State::Ready { held, leases: 0, idle_since, lost: Some(cause) };
                self.set_state(slot, ready, Cause::Failed, now);
                self.unload_if_lost(slot, now);
            }
        }
    }

    /// Someone asked for the memory of a load that was being given up, and the load succeeded all the same.
    fn unload_if_asked(&mut self, slot: SlotId, now: Timestamp) {
        if self.slots[slot.0].unload_waiters.is_empty() {
            return;
        }
        let leases = self.queue.count(slot);
        if leases == 0 {
            return self.start_unload(slot, Cause::Asked, now);
        }
        let model = self.slots[slot.0].spec.model.clone();
        for id in std::mem::take(&mut self.slots[slot.0].unload_waiters) {
            let error = Error::InUse { model: model.clone(), leases };
            self.effects.push_back(Effect::UnloadDone { id, result: Err(error) });
        }
    }

    /// A load that ends above the budget, where the eviction of others cannot make that good, is taken back. Whoever
    /// waits for it hears the true figure if it took more than was reserved for it; else the budget became smaller
    /// meanwhile, and they wait for room again.
    fn unload_if_over_budget(&mut self, slot: SlotId, now: Timestamp) {
        let State::Ready { held, .. } = &self.slots[slot.0].state else { return };
        let (asked, reserved) = (self.ledger.bytes(&held.reservation), held.estimate.reserve());
        // What a model on a host takes here makes nothing good: it would only be loaded again.
        if self.ledger.frees([&held.reservation]) == Bytes::ZERO || self.can_make_good(slot, now) {
            return;
        }
        if asked > reserved {
            let own = &self.slots[slot.0].spec.model;
            let holders: Vec<_> = self.ledger.holders().into_iter().filter(|h| h.model != *own).collect();
            let budget = self.ledger.budget();
            let left = budget.saturating_sub(self.ledger.used().saturating_sub(asked));
            let error = |model| Error::OverBudget { model, asked, left, budget, holders: holders.clone() };
            self.reject_waiters(slot, &error);
        }
        self.start_unload(slot, Cause::Budget, now);
    }

    fn back_off(&mut self, slot: SlotId, cause: &Failure, now: Timestamp) {
        let entry = &mut self.slots[slot.0];
        let pause = BACKOFF_FIRST.saturating_mul(1 << entry.failures.min(10)).min(BACKOFF_LONGEST);
        entry.failures += 1;
        entry.backoff = Some(Backoff { until: now + pause, cause: cause.clone() });
    }

    fn on_unloaded(&mut self, slot: SlotId, now: Timestamp) {
        let (held, cause) = match self.slots[slot.0].take_state() {
            State::Unloading { held, cause } => (held, cause),
            other => return self.slots[slot.0].state = other,
        };
        let bytes = self.ledger.release(held.reservation);
        self.slots[slot.0].last_unload = Some(now.since(self.slots[slot.0].since));
        self.set_state(slot, State::Absent, cause, now);
        self.answer_unloads(slot, bytes);
    }

    fn answer_unloads(&mut self, slot: SlotId, freed: Bytes) {
        for id in std::mem::take(&mut self.slots[slot.0].unload_waiters) {
            self.effects.push_back(Effect::UnloadDone { id, result: Ok(freed) });
        }
    }

    fn on_unload(&mut self, id: RequestId, slot: SlotId, now: Timestamp) {
        let entry = &mut self.slots[slot.0];
        let model = entry.spec.model.clone();
        let in_use = |leases| Error::InUse { model: model.clone(), leases };
        let refusal = match &entry.state {
            State::Absent => {
                return self.effects.push_back(Effect::UnloadDone { id, result: Ok(Bytes::ZERO) });
            }
            State::Unloading { .. } => return entry.unload_waiters.push(id),
            State::Ready { .. } | State::Loading { .. } | State::Resizing { .. } if entry.pinned => {
                Error::Pinned { model }
            }
            // It is answered when that is done.
            State::Resizing { .. } => return entry.unload_waiters.push(id),
            State::Ready { leases: 0, .. } => {
                entry.unload_waiters.push(id);
                return self.start_unload(slot, Cause::Asked, now);
            }
            State::Ready { leases, .. } => in_use(*leases),
            // Given up already: its end is near.
            State::Loading { .. } if !self.queue.waits_for(slot) => return entry.unload_waiters.push(id),
            State::Estimating { .. } | State::Sized { .. } | State::Loading { .. } => {
                in_use(self.queue.count(slot))
            }
        };
        self.effects.push_back(Effect::UnloadDone { id, result: Err(refusal) });
    }

    fn on_shutdown(&mut self, how: Shutdown, now: Timestamp) {
        if self.shutdown == Shutdown::Done {
            return;
        }
        self.shutdown = how;
        for waiting in self.queue.drain() {
            self.effects.push_back(Effect::Reject { id: waiting.id, error: Error::ShuttingDown });
        }
        for slot in (0..self.slots.len()).map(SlotId) {
            self.after_waiter_left(slot, now);
        }
    }

    /// Unloads what is idle while a shutdown is under way, and says so once nothing is left.
    fn finish_shutdown(&mut self, now: Timestamp) {
        if matches!(self.shutdown, Shutdown::No | Shutdown::Done) {
            return;
        }
        for slot in (0..self.slots.len()).map(SlotId) {
            let State::Ready { leases, .. } = self.slots[slot.0].state else { continue };
            if leases == 0 || self.shutdown == Shutdown::Now {
                self.leases.retain(|_, leased| *leased != slot);
                self.start_unload(slot, Cause::Shutdown, now);
            }
        }
        if self.slots.iter().all(|slot| matches!(slot.state, State::Absent)) {
            self.shutdown = Shutdown::Done;
            self.effects.push_back(Effect::Stopped);
        }
    }

    /// Deadlines and TTLs that have passed.
    fn expire(&mut self, now: Timestamp) {
        let expired = self.queue.take_expired(now);
        for waiting in &expired {
            let model = self.slots[waiting.slot.0].spec.model.clone();
            let waited = now.since(waiting.arrived);
            let (holders, machine) = (self.ledger.holders(), self.ledger.ceiling());
            let others = self.ledger.others();
            self.reject(waiting.id, Error::WaitTimeout { model, waited, holders, machine, others });
        }
        for waiting in expired {
            self.after_waiter_left(waiting.slot, now);
        }
        for slot in (0..self.slots.len()).map(SlotId) {
            if self.slots[slot.0].expires_at().is_some_and(|at| at <= now) && !self.queue.waits_for(slot) {
                self.start_unload(slot, Cause::Ttl, now);
            }
        }
    }

    /// Gives up what is under way for a slot that nobody waits for any more. Residents are loaded in any case.
    fn after_waiter_left(&mut self, slot: SlotId, now: Timestamp) {
        let stopping = self.shutdown != Shutdown::No;
        if self.queue.waits_for(slot) {
            return;
        }
        let entry = &mut self.slots[slot.0];
        match &mut entry.state {
            State::Sized { .. } | State::Estimating { .. } => {
                self.set_state(slot, State::Absent, Cause::Abandoned, now)
            }
            State::Loading { cancelled, .. } if !*cancelled && (stopping || !entry.pinned) => {
                *cancelled = true;
                self.effects.push_back(Effect::CancelLoad { slot });
            }
            State::Absent
            | State::Loading { .. }
            | State::Ready { .. }
            | State::Resizing { .. }
            | State::Unloading { .. } => {}
        }
    }

    fn start_unload(&mut self, slot: SlotId, cause: Cause, now: Timestamp) {
        self.tell_chosen(slot, cause, now);
        match self.slots[slot.0].take_state() {
            State::Ready { held, .. } => {
                if cause == Cause::Evicted {
                    self.slots[slot.0].evicted = Some(now);
                }
                self.set_state(slot, State::Unloading { held, cause }, cause, now);
                self.effects.push_back(Effect::StartUnload { slot });
            }
            other => self.slots[slot.0].state = other,
        }
    }

    /// Gives an idle slot another context. Room for a longer one is taken now, that of a shorter one is free when it is made.
    fn start_resize(&mut self, slot: SlotId, to: Estimate, cause: Cause, now: Timestamp) {
        self.tell_chosen(slot, cause, now);
        match self.slots[slot.0].take_state() {
            State::Ready { held, idle_since, .. } => {
                let holds = self.ledger.bytes(&held.reservation);
                let becomes = (holds + to.saves(&held.estimate)).saturating_sub(held.estimate.saves(&to));
                self.ledger.settle(&held.reservation, becomes.max(holds));
                let grows = to.saves(&held.estimate) > Bytes::ZERO;
                let state = State::Resizing { held, to: Box::new(to.clone()), becomes, idle_since };
                self.set_state(slot, state, cause, now);
                self.effects.push_back(Effect::Resize { slot, estimate: to, grows });
            }
            other => self.slots[slot.0].state = other,
        }
    }

    /// Says by what a ready model was chosen to give memory back.
    fn tell_chosen(&mut self, slot: SlotId, cause: Cause, now: Timestamp) {
        let gives_back = matches!(
            cause,
            Cause::Evicted | Cause::Shortened | Cause::Budget | Cause::Pressure | Cause::Others
        );
        let Some(candidate) = self.candidate(slot, now).filter(|_| gives_back) else { return };
        self.effects.push_back(Effect::Chosen(Chosen {
            model: self.slots[slot.0].spec.model.clone(),
            cause,
            idle: candidate.idle,
            bytes: candidate.claim.total(),
            load: candidate.reload,
            uses: candidate.uses,
            score: candidate.worth(true),
            used: self.ledger.used(),
            limit: self.ledger.limit(),
        }));
    }

    fn reject(&mut self, id: RequestId, error: Error) {
        self.effects.push_back(Effect::Reject { id, error });
    }

    fn reject_waiters(&mut self, slot: SlotId, error: &dyn Fn(ModelName) -> Error) {
        for waiting in self.queue.take_all(slot) {
            self.reject(waiting.id, error(self.slots[slot.0].spec.model.clone()));
        }
    }

    /// The one place where a slot changes its state. The change goes out with the ledger's figures of that moment.
    fn set_state(&mut self, slot: SlotId, state: State, cause: Cause, now: Timestamp) {
        let entry = &mut self.slots[slot.0];
        let from = entry.phase;
        entry.state = state;
        entry.phase = entry.state.phase();
        let change = self.change(slot, from, cause, now);
        self.slots[slot.0].since = now;
        self.effects.push_back(Effect::Changed(change));
    }

    fn change(&self, slot: SlotId, from: Phase, cause: Cause, now: Timestamp) -> Change {
        let entry = &self.slots[slot.0];
        let held = entry.state.held();
        Change {
            slot,
            model: entry.spec.model.clone(),
            from,
            to: entry.phase,
            cause,
            at: now,
            took: now.since(entry.since),
            bytes: held.map_or(Bytes::ZERO, |held| self.ledger.bytes(&held.reservation)),
            estimate: held.map(|held| held.estimate.clone()),
            measured: held.and_then(|held| held.measured),
            used: self.ledger.used(),
            budget: self.ledger.budget(),
            limit: self.ledger.limit(),
            left: self.ledger.left(),
            llms: self.counted_llms().len(),
        }
    }

    /// The LLMs that are loaded, loading or not yet gone.
    fn counted_llms(&self) -> BTreeSet<&ModelName> {
        self.slots.iter().filter(|slot| slot.counts()).map(|slot| &slot.spec.model).collect()
    }
}

/// What a load took, where that was measured and is more than it was expected to.
fn took(estimate: &Estimate, measured: Option<Footprint>, at: Timestamp) -> Option<Took> {
    let expected = estimate.total().min(estimate.reserve());
    let bytes = measured.filter(|measured| measured.exact)?.total().filter(|total| *total > expected)?;
    Some(Took { bytes, n_ctx: estimate.n_ctx, at })
}

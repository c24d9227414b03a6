//! What a trace of requests would make a pool do: the scheduler itself, on a clock that jumps. To choose a budget, a limit
//! or a way of evicting before the memory is bought.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use serde::Serialize;

use crate::answer::Priority;
use crate::error::Error;
use crate::memory::Estimate;
use crate::request::Capability;
use crate::scheduler::{
    Ask, Cause, Change, Effect, Event, Limits, Phase, RequestId, Scheduler, SlotId, SlotSpec,
};
use crate::units::{Bytes, Timestamp};

/// A slot, with what it would take.
#[derive(Clone, Debug)]
pub struct SimulatedSlot {
    /// What the scheduler knows of it.
    pub spec: SlotSpec,
    /// What a load takes of memory.
    pub estimate: Estimate,
    /// How long a load takes.
    pub load: Duration,
    /// How long an unload takes, or another context.
    pub unload: Duration,
}

/// A request of a trace.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// When it comes.
    pub at: Timestamp,
    /// Whom it asks.
    pub slot: SlotId,
    /// How long it runs once it is let in.
    pub runs: Duration,
}

/// What came of a trace.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Simulated {
    /// Requests of the trace.
    pub requests: usize,
    /// Requests that were served.
    pub served: usize,
    /// Requests that were not, by the first words of their error.
    pub refused: BTreeMap<String, usize>,
    /// Requests that found their model absent or on its way in or out.
    pub misses: usize,
    /// Loads that came to their end.
    pub loads: usize,
    /// The time that these took, together.
    pub load_seconds: f64,
    /// Models that left for others.
    pub evictions: usize,
    /// Contexts that became shorter for others.
    pub shortened: usize,
    /// What these loads reserved, together.
    pub bytes_loaded: Bytes,
    /// The most that was held at once.
    pub peak_bytes: Bytes,
    /// From arrival to the beginning of the answer: half of the requests that were served waited no longer.
    pub wait_p50_seconds: f64,
    /// 99 of 100 waited no longer.
    pub wait_p99_seconds: f64,
}

/// Something that is going to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Loaded(SlotId),
    Unloaded(SlotId),
    Resized(SlotId),
    Ended(RequestId),
    Arrives(usize),
    Tick,
}

struct Simulation<'t> {
    scheduler: Scheduler,
    slots: &'t [SimulatedSlot],
    trace: &'t [Arrival],
    wait: Duration,
    now: Timestamp,
    /// Earliest first; of one moment, in the order of [`Due`].
    due: BinaryHeap<Reverse<(Timestamp, Due)>>,
    waits: Vec<Duration>,
    result: Simulated,
}

/// Plays a trace, in the order of its times. Requests wait for `wait` at most.
#[must_use]
pub fn simulate(limits: Limits, slots: &[SimulatedSlot], trace: &[Arrival], wait: Duration) -> Simulated {
    let specs = slots.iter().map(|slot| slot.spec.clone()).collect();
    let mut simulation = Simulation {
        scheduler: Scheduler::new(limits, specs),
        slots,
        trace,
        wait,
        now: Timestamp::default(),
        due: trace.iter().enumerate().map(|(at, one)| Reverse((one.at, Due::Arrives(at)))).collect(),
        waits: Vec::new(),
        result: Simulated { requests: trace.len(), ..Simulated::default() },
    };
    while let Some(Reverse((at, due))) = simulation.due.pop() {
        simulation.now = simulation.now.max(at);
        simulation.happen(due);
    }
    simulation.finish()
}

impl Simulation<'_> {
    fn happen(&mut self, due: Due) {
        match due {
            Due::Arrives(at) => {
                let slot = self.trace[at].slot;
                let status = self.scheduler.status(self.now);
                let ready = status.slots.get(slot.0).is_some_and(|slot| slot.phase == Phase::Ready);
                self.result.misses += usize::from(!ready);
                let capabilities = self.slots[slot.0].spec.capabilities;
                let can = Capability::ALL.into_iter().find(|one| capabilities.has(*one));
                let ask = Ask {
                    capability: can.unwrap_or(Capability::Generate),
                    priority: Priority::Normal,
                    deadline: self.now + self.wait,
                    spare: None,
                };
                self.handle(Event::Request { id: RequestId(at as u64), slot, ask });
            }
            Due::Ended(id) => self.handle(Event::Return { id }),
            Due::Loaded(slot) => {
                self.result.loads += 1;
                self.result.load_seconds += self.slots[slot.0].load.as_secs_f64();
                self.result.bytes_loaded += self.slots[slot.0].estimate.reserve();
                self.handle(Event::Loaded { slot, result: Ok(None) });
            }
            Due::Unloaded(slot) => self.handle(Event::Unloaded { slot }),
            Due::Resized(slot) => self.handle(Event::Resized { slot, result: Ok(None) }),
            Due::Tick => self.handle(Event::Tick),
        }
        if let Some(tick) = self.scheduler.poll_timeout() {
            let next = self.due.peek().map(|Reverse((at, _))| *at);
            if next.is_none_or(|next| tick < next) {
                self.due.push(Reverse((tick, Due::Tick)));
            }
        }
    }

    fn handle(&mut self, event: Event) {
        self.scheduler.handle(event, self.now);
        while let Some(effect) = self.scheduler.poll_effect() {
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        let mut later = |after: Duration, due| self.due.push(Reverse((self.now + after, due)));
        match effect {
            Effect::Estimate { slot, left, .. } => {
                let result = Ok(self.slots[slot.0].estimate.clone());
                self.scheduler.handle(Event::Estimated { slot, left, short: false, result }, self.now);
            }
            Effect::StartLoad { slot, .. } => later(self.slots[slot.0].load, Due::Loaded(slot)),
            Effect::Resize { slot, .. } => later(self.slots[slot.0].unload, Due::Resized(slot)),
            Effect::StartUnload { slot } => later(self.slots[slot.0].unload, Due::Unloaded(slot)),
            Effect::Grant { id, queued, loading, .. } => {
                self.waits.push(queued + loading);
                later(self.trace[id.0 as usize].runs, Due::Ended(id));
            }
            Effect::Reject { error, .. } => self.refuse(&error),
            Effect::Changed(Change { to: Phase::Unloading, cause, .. }) => {
                self.result.evictions += usize::from(cause == Cause::Evicted);
            }
            Effect::Changed(Change { to: Phase::Resizing, cause, .. }) => {
                self.result.shortened += usize::from(cause == Cause::Shortened);
            }
            // A load that is given up runs to its end here, as one does that has come too far.
            Effect::CancelLoad { .. }
            | Effect::Chosen(_)
            | Effect::Changed(_)
            | Effect::Settled(_)
            | Effect::UnloadDone { .. }
            | Effect::Stopped => {}
        }
    }

    fn refuse(&mut self, error: &Error) {
        let kind = match error {
            Error::OverBudget { .. } => "over budget",
            Error::TooManyLlms { .. } => "too many LLMs",
            Error::WaitTimeout { .. } => "waited too long",
            Error::QueueFull { .. } => "queue full",
            _ => "other",
        };
        *self.result.refused.entry(kind.to_owned()).or_default() += 1;
    }

    fn finish(mut self) -> Simulated {
        self.waits.sort();
        let at = |part: f64| {
            let index = (self.waits.len() as f64 * part).ceil() as usize;
            self.waits.get(index.saturating_sub(1)).map_or(0.0, Duration::as_secs_f64)
        };
        let (p50, p99) = (at(0.5), at(0.99));
        Simulated {
            served: self.waits.len(),
            peak_bytes: self.scheduler.status(self.now).peak,
            wait_p50_seconds: p50,
            wait_p99_seconds: p99,
            ..self.result
        }
    }
}

use std::time::Duration;

use super::queue::Queue;
use super::slot::{Held, Slot, State};
use super::{Ask, Cause, Effect, Event, Phase, RequestId, Scheduler, Shutdown, SlotId};
use crate::answer::Priority;
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::memory::{Estimate, Ledger};
use crate::request::Capability;
use crate::units::{Bytes, ModelName, Timestamp};

/// What a request for one slot would do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The slot that was asked for.
    pub slot: SlotId,
    /// Whether it would be served without waiting for a request in progress.
    pub fits: bool,
    /// What would be loaded, the slot itself included; empty if it is ready.
    pub load: Vec<PlannedLoad>,
    /// Which models would be evicted.
    pub evict: Vec<ModelName>,
    /// Which models would get a shorter context.
    pub shorten: Vec<ModelName>,
    /// How long these evictions and changes of context took the last time, together; `None` where that is not known of all.
    pub freeing: Option<Duration>,
    /// Why it would be refused or, if `fits` is false and this is `None`, it would wait for busy models.
    pub refuse: Option<Error>,
}

/// A load of a [`Plan`].
#[derive(Clone, Debug)]
pub struct PlannedLoad {
    /// The slot.
    pub slot: SlotId,
    /// What would be reserved.
    pub estimate: Estimate,
}

impl Scheduler {
    /// What requests for these slots, one after another, would load, evict and refuse. Decided by the scheduler's own
    /// code on a copy of its state, in which every load and unload succeeds at once; nothing happens to the original.
    /// `sizes` gives each slot's estimate, or why there is none.
    #[must_use]
    pub fn plan(
        &self,
        wanted: &[SlotId],
        sizes: &dyn Fn(SlotId) -> Result<Estimate, Failure>,
        now: Timestamp,
    ) -> Vec<Plan> {
        let mut copy = self.copy();
        let numbered = (u64::MAX / 2..).map(RequestId);
        wanted.iter().zip(numbered).map(|(slot, id)| copy.play(*slot, id, sizes, now)).collect()
    }

    fn play(
        &mut self,
        slot: SlotId,
        id: RequestId,
        sizes: &dyn Fn(SlotId) -> Result<Estimate, Failure>,
        now: Timestamp,
    ) -> Plan {
        let mut plan = Plan {
            slot,
            fits: false,
            load: Vec::new(),
            evict: Vec::new(),
            shorten: Vec::new(),
            freeing: Some(Duration::ZERO),
            refuse: None,
        };
        let capabilities = self.slots[slot.0].spec.capabilities;
        let Some(capability) = Capability::ALL.into_iter().find(|one| capabilities.has(*one)) else {
            return plan;
        };
        let ask =
            Ask { capability, priority: Priority::Interactive, deadline: now + Duration::MAX, spare: None };
        self.handle(Event::Request { id, slot, ask }, now);
        while let Some(effect) = self.poll_effect() {
            match effect {
                Effect::Estimate { slot, left, .. } => {
                    let result = sizes(slot);
                    self.handle(Event::Estimated { slot, left, short: false, result }, now);
                }
                Effect::StartLoad { slot, estimate } => {
                    plan.load.push(PlannedLoad { slot, estimate });
                    self.handle(Event::Loaded { slot, result: Ok(None) }, now);
                }
                Effect::CancelLoad { slot } => {
                    let cancelled = Failure::new(FailureKind::Cancelled, "given up");
                    self.handle(Event::Loaded { slot, result: Err(cancelled) }, now);
                }
                Effect::Resize { slot, .. } => self.handle(Event::Resized { slot, result: Ok(None) }, now),
                Effect::StartUnload { slot } => self.handle(Event::Unloaded { slot }, now),
                Effect::Changed(change)
                    if change.to == Phase::Unloading && change.cause == Cause::Evicted =>
                {
                    plan.freeing =
                        plan.freeing.zip(self.slots[change.slot.0].last_unload).map(|(a, b)| a + b);
                    plan.evict.push(change.model);
                }
                Effect::Changed(change)
                    if change.to == Phase::Resizing && change.cause == Cause::Shortened =>
                {
                    plan.freeing =
                        plan.freeing.zip(self.slots[change.slot.0].last_resize).map(|(a, b)| a + b);
                    plan.shorten.push(change.model);
                }
                Effect::Grant { id: granted, .. } if granted == id => plan.fits = true,
                Effect::Reject { id: rejected, error } if rejected == id => plan.refuse = Some(error),
                Effect::Grant { .. }
                | Effect::Reject { .. }
                | Effect::UnloadDone { .. }
                | Effect::Chosen(_)
                | Effect::Changed(_)
                | Effect::Settled(_)
                | Effect::Stopped => {}
            }
        }
        self.handle(Event::Return { id }, now);
        while self.poll_effect().is_some() {}
        plan
    }

    /// A copy with the same state and an empty queue: those who wait now must not appear in someone else's plan.
    fn copy(&self) -> Self {
        let mut ledger = Ledger::new(self.ledger.budget());
        ledger.set_ceiling(self.ledger.ceiling());
        ledger.set_others(self.ledger.others());
        ledger.set_spare(self.ledger.spare());
        let slots = self.slots.iter().map(|slot| copy_slot(slot, &self.ledger, &mut ledger)).collect();
        Self {
            limits: self.limits,
            slots,
            ledger,
            queue: Queue::default(),
            leases: self.leases.clone(),
            effects: std::collections::VecDeque::new(),
            shutdown: Shutdown::No,
            attainable: self.attainable,
            pressed: false,
            wanted: Bytes::ZERO,
            stays_until: None,
            grants: self.grants,
        }
    }
}

/// Loads under way are taken as ended, unloads likewise: a plan is about what comes after them.
fn copy_slot(slot: &Slot, from: &Ledger, to: &mut Ledger) -> Slot {
    let mut copy = Slot::new(slot.spec.clone());
    copy.pinned = slot.pinned;
    copy.took = slot.took;
    copy.last_load = slot.last_load;
    copy.last_unload = slot.last_unload;
    copy.last_resize = slot.last_resize;
    copy.uses = slot.uses;
    copy.shortened = slot.shortened;
    copy.failures = slot.failures;
    copy.backoff = slot.backoff.clone();
    copy.evicted = slot.evicted;
    let (held, leases, idle_since) = match &slot.state {
        State::Ready { held, leases, idle_since, .. } => (held, *leases, *idle_since),
        State::Loading { held, started, .. } => (held, 0, *started),
        // What a shorter context frees is not counted yet: the plan errs on the safe side.
        State::Resizing { held, idle_since, .. } => (held, 0, *idle_since),
        State::Absent | State::Estimating { .. } | State::Sized { .. } | State::Unloading { .. } => {
            return copy;
        }
    };
    // Not reserved anew: an overrun of the original is an overrun of the copy.
    let Some(reservation) = to.adopt(from, &held.reservation) else { return copy };
    let held = Held {
        reservation,
        estimate: held.estimate.clone(),
        measured: held.measured,
        whole: held.whole.clone(),
    };
    copy.state = State::Ready { held, leases, idle_since, lost: None };
    copy.phase = Phase::Ready;
    copy
}

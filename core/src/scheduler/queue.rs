use std::cmp::Reverse;
use std::time::Duration;

use super::{Ask, RequestId, SlotId};
use crate::units::Timestamp;

/// A request that waits for its slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) id: RequestId,
    pub(super) slot: SlotId,
    pub(super) ask: Ask,
    pub(super) arrived: Timestamp,
}

/// The waiting requests of all slots, in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Vec<Waiting>,
}

impl Queue {
    pub(super) fn push(&mut self, waiting: Waiting) {
        self.waiting.push(waiting);
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn remove(&mut self, id: RequestId) -> Option<Waiting> {
        let at = self.waiting.iter().position(|waiting| waiting.id == id)?;
        Some(self.waiting.remove(at))
    }

    pub(super) fn contains(&self, id: RequestId) -> bool {
        self.waiting.iter().any(|waiting| waiting.id == id)
    }

    pub(super) fn waits_for(&self, slot: SlotId) -> bool {
        self.waiting.iter().any(|waiting| waiting.slot == slot)
    }

    pub(super) fn count(&self, slot: SlotId) -> usize {
        self.waiting.iter().filter(|waiting| waiting.slot == slot).count()
    }

    /// What all that wait for a slot spare; none where one of them spares nobody, or nobody waits.
    pub(super) fn spare(&self, slot: SlotId) -> Option<Duration> {
        let spares =
            self.waiting.iter().filter(|waiting| waiting.slot == slot).map(|waiting| waiting.ask.spare);
        spares.min().flatten()
    }

    pub(super) fn take_all(&mut self, slot: SlotId) -> Vec<Waiting> {
        self.waiting.extract_if(.., |waiting| waiting.slot == slot).collect()
    }

    pub(super) fn take_expired(&mut self, now: Timestamp) -> Vec<Waiting> {
        self.waiting.extract_if(.., |waiting| waiting.ask.deadline <= now).collect()
    }

    pub(super) fn drain(&mut self) -> Vec<Waiting> {
        std::mem::take(&mut self.waiting)
    }

    pub(super) fn earliest_deadline(&self) -> Option<Timestamp> {
        self.waiting.iter().map(|waiting| waiting.ask.deadline).min()
    }

    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.waiting.iter().map(|waiting| waiting.arrived).min()
    }

    pub(super) fn oldest_for(&self, slot: SlotId) -> Option<Timestamp> {
        self.waiting.iter().filter(|waiting| waiting.slot == slot).map(|waiting| waiting.arrived).min()
    }

    /// The requests in the order in which they are to be served: most urgent first, each class of priority that was
    /// waited for counted in, then by arrival.
    pub(super) fn in_order(&self, now: Timestamp, aging: Duration) -> Vec<Waiting> {
        let mut order = self.waiting.clone();
        order.sort_by_key(|waiting| {
            let waited = now.since(waiting.arrived).as_nanos();
            let classes = waited.checked_div(aging.as_nanos()).unwrap_or(0);
            // Stable: equal keys stay in the order of arrival.
            Reverse((waiting.ask.priority as u128 + classes).min(2))
        });
        order
    }
}

use std::time::Duration;

use super::{Phase, Scheduler, SlotId, State};
use crate::config::Class;
use crate::error::Holder;
use crate::memory::{Estimate, Footprint};
use crate::units::{Bytes, ModelName, Timestamp};

/// The pool as the scheduler sees it at one moment.
#[derive(Clone, Debug)]
pub struct PoolStatus {
    /// The budget.
    pub budget: Bytes,
    /// What may be held just now: the budget, or what the machine has memory for where that is less.
    pub limit: Bytes,
    /// How much of the budget other processes have, where they share it.
    pub others: Bytes,
    /// What of it loads may still take.
    pub left: Bytes,
    /// What the ledger holds.
    pub used: Bytes,
    /// The most it ever held.
    pub peak: Bytes,
    /// Who holds it, largest first.
    pub holders: Vec<Holder>,
    /// LLMs loaded or loading.
    pub llms: usize,
    /// The limit on these.
    pub max_concurrent_llms: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// How long the oldest of them has waited.
    pub oldest_waiting: Option<Duration>,
    /// One entry per slot, in the order of their ids.
    pub slots: Vec<SlotStatus>,
}

/// One slot at one moment.
#[derive(Clone, Debug)]
pub struct SlotStatus {
    /// The slot.
    pub slot: SlotId,
    /// Its model.
    pub model: ModelName,
    /// Its state.
    pub phase: Phase,
    /// Its class.
    pub class: Class,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Its estimate, while it is loaded, loading or waiting for room.
    pub estimate: Option<Estimate>,
    /// What the ledger holds for it.
    pub reserved: Bytes,
    /// What its load, and its steps since, were measured to take.
    pub measured: Option<Footprint>,
    /// Requests that run on it.
    pub leases: usize,
    /// Requests that wait for it.
    pub waiting: usize,
    /// How long it has been idle, if it is.
    pub idle: Option<Duration>,
    /// When its TTL ends, if it is idle and has one.
    pub expires_in: Option<Duration>,
    /// Why its last load failed, while that holds the next one back.
    pub failure: Option<String>,
}

/// A phase's name in tables, metrics and JSON.
impl Phase {
    /// The name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Estimating => "estimating",
            Self::Waiting => "waiting",
            Self::Loading => "loading",
            Self::Resizing => "resizing",
            Self::Ready => "ready",
            Self::Unloading => "unloading",
        }
    }
}

impl Scheduler {
    /// How many requests wait at `now`, and how long the oldest of them has.
    #[must_use]
    pub fn waiting(&self, now: Timestamp) -> (usize, Option<Duration>) {
        (self.queue.len(), self.queue.oldest().map(|arrived| now.since(arrived)))
    }

    /// What holds at `now`.
    #[must_use]
    pub fn status(&self, now: Timestamp) -> PoolStatus {
        let (waiting, oldest_waiting) = self.waiting(now);
        PoolStatus {
            budget: self.ledger.budget(),
            limit: self.ledger.limit(),
            others: self.ledger.others(),
            left: self.ledger.left(),
            used: self.ledger.used(),
            peak: self.ledger.peak(),
            holders: self.ledger.holders(),
            llms: self.counted_llms().len(),
            max_concurrent_llms: self.limits.max_concurrent_llms,
            waiting,
            oldest_waiting,
            slots: (0..self.slots.len()).map(|slot| self.slot_status(SlotId(slot), now)).collect(),
        }
    }

    fn slot_status(&self, id: SlotId, now: Timestamp) -> SlotStatus {
        let slot = &self.slots[id.0];
        let held = slot.state.held();
        let (leases, idle) = match slot.state {
            State::Ready { leases: 0, idle_since, .. } => (0, Some(now.since(idle_since))),
            State::Ready { leases, .. } => (leases, None),
            State::Absent
            | State::Estimating { .. }
            | State::Sized { .. }
            | State::Loading { .. }
            | State::Resizing { .. }
            | State::Unloading { .. } => (0, None),
        };
        let estimate = match &slot.state {
            State::Sized { estimate, .. } => Some(estimate.clone()),
            state => state.held().map(|held| held.estimate.clone()),
        };
        SlotStatus {
            slot: id,
            model: slot.spec.model.clone(),
            phase: slot.state.phase(),
            class: slot.spec.class,
            pinned: slot.pinned,
            estimate,
            reserved: held.map_or(Bytes::ZERO, |held| self.ledger.bytes(&held.reservation)),
            measured: held.and_then(|held| held.measured),
            leases,
            waiting: self.queue.count(id),
            idle,
            expires_in: slot.expires_at().map(|at| at.since(now)),
            failure: slot.backoff.as_ref().filter(|b| b.until > now).map(|b| b.cause.to_string()),
        }
    }
}

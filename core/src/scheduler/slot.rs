use std::time::Duration;

use serde::Serialize;

use super::{HALF_LIFE, RequestId, SlotId, SlotSpec};
use crate::config::Class;
use crate::error::Error;
use crate::failure::Failure;
use crate::memory::{Estimate, Footprint, Reservation};
use crate::units::{Bytes, ModelName, Timestamp};

/// A model that is loaded again within this time after it had to leave is pushed about.
const CHURN: Duration = Duration::from_mins(1);

/// The longest that it then stays for this.
const LONGEST_STAY: Duration = Duration::from_secs(2);

/// A load that took more than was reserved is expected to take as much again for this long. Then it is tried by its estimate:
/// the program around the pool allocates, too, and what it took meanwhile must not keep a model out for good.
const TAKES_MORE: Duration = Duration::from_mins(10);

/// One slot: its fixed facts, its state, and what outlives the state.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) spec: SlotSpec,
    pub(super) state: State,
    /// The state's name as last announced; differs from `state.phase()` only inside a transition.
    pub(super) phase: Phase,
    /// When it came into that state.
    pub(super) since: Timestamp,
    pub(super) pinned: bool,
    pub(super) failures: u32,
    pub(super) backoff: Option<Backoff>,
    /// When its context was last made shorter.
    pub(super) shortened: Option<Timestamp>,
    /// What its last load took, if that was more than was reserved for it.
    pub(super) took: Option<Took>,
    pub(super) last_load: Option<(Timestamp, Timestamp)>,
    /// How long its last unload took, and its last change of context.
    pub(super) last_unload: Option<Duration>,
    pub(super) last_resize: Option<Duration>,
    /// When it last had to leave for another model.
    pub(super) evicted: Option<Timestamp>,
    /// Its uses so far, worth less with each of another model, and how many of all there were when that was counted.
    pub(super) uses: (f64, u64),
    pub(super) unload_waiters: Vec<RequestId>,
}

/// A load that took more than was reserved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Took {
    pub(super) bytes: Bytes,
    pub(super) n_ctx: Option<u32>,
    pub(super) at: Timestamp,
}

/// After a failed load: when the next one may be tried, and why the last one failed.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    pub(super) until: Timestamp,
    pub(super) cause: Failure,
}

/// What a slot holds from the start of its load to the end of its unload.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) reservation: Reservation,
    /// As it is now.
    pub(super) estimate: Estimate,
    pub(super) measured: Option<Footprint>,
    /// As it was loaded, while its context is shorter than that.
    pub(super) whole: Option<Box<Estimate>>,
}

#[derive(Debug)]
pub(super) enum State {
    /// Holds nothing. To `Estimating` when someone asks for it.
    Absent,
    /// Its size is being found out. To `Sized`, or to `Absent` when that fails or nobody waits.
    /// `before` is its estimate for less room, or for more.
    Estimating { before: Option<Estimate> },
    /// Its size is known for so much room; it waits. To `Loading`, to `Estimating` when more is left than it was sized for
    /// or too little, or to `Absent` when it can never fit or nobody waits.
    Sized { estimate: Estimate, left: Bytes },
    /// To `Ready`, or to `Absent` when the load fails or is given up.
    Loading { held: Held, started: Timestamp, cancelled: bool },
    /// Its context becomes as in `to`, shorter or longer, and it holds `becomes` then. To `Ready`, and where that fails from there to `Unloading`.
    Resizing { held: Held, to: Box<Estimate>, becomes: Bytes, idle_since: Timestamp },
    /// Can be used. To `Resizing` while it is idle. To `Unloading`, never while leases are out (the end of a shutdown's grace excepted).
    /// With `lost`, its engine has ended: nobody new may use it, and it goes when the last lease is back.
    Ready { held: Held, leases: usize, idle_since: Timestamp, lost: Option<Failure> },
    /// Its memory is on its way back. To `Absent`.
    Unloading { held: Held, cause: Cause },
}

/// The name of a slot's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Not loaded.
    Absent,
    /// Its size is being found out.
    Estimating,
    /// Its size is known; it waits for room.
    Waiting,
    /// Being loaded.
    Loading,
    /// Its context is being made shorter or longer.
    Resizing,
    /// Ready to answer.
    Ready,
    /// Its memory is on its way back.
    Unloading,
}

/// Why a slot changed its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A request wants it.
    Request,
    /// Another model needs its room.
    Evicted,
    /// Another model needs a part of its room: its context becomes shorter.
    Shortened,
    /// There is room for its whole context again.
    Lengthened,
    /// It was idle for its TTL.
    Ttl,
    /// Someone asked for it.
    Asked,
    /// The budget became smaller.
    Budget,
    /// The machine is short of memory.
    Pressure,
    /// Other processes have, or wait for, the room in a shared budget.
    Others,
    /// Another process took the room first.
    Taken,
    /// It was found to hold more.
    Measured,
    /// Nobody wants it any more.
    Abandoned,
    /// It failed.
    Failed,
    /// It can never fit.
    TooLarge,
    /// The pool is shutting down.
    Shutdown,
}

impl Cause {
    /// The cause's name in metrics and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Evicted => "evicted",
            Self::Shortened => "shortened",
            Self::Lengthened => "lengthened",
            Self::Ttl => "ttl",
            Self::Asked => "asked",
            Self::Budget => "budget",
            Self::Pressure => "pressure",
            Self::Others => "others",
            Self::Taken => "taken",
            Self::Measured => "measured",
            Self::Abandoned => "abandoned",
            Self::Failed => "failed",
            Self::TooLarge => "too_large",
            Self::Shutdown => "shutdown",
        }
    }
}

/// A model that was chosen to give memory back, and what that was decided by.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The model.
    pub model: ModelName,
    /// For what. [`Cause::Shortened`] leaves it its weights.
    pub cause: Cause,
    /// How long it has been idle.
    pub idle: Duration,
    /// What the ledger holds for it.
    pub bytes: Bytes,
    /// How long its last load took.
    pub load: Duration,
    /// How often it was used of late; see [`Candidate::uses`](super::Candidate::uses).
    pub uses: f64,
    /// How little it costs to be without it; see [`Candidate::worth`](super::Candidate::worth).
    pub score: f64,
    /// What the ledger holds in all.
    pub used: Bytes,
    /// What may be held just now.
    pub limit: Bytes,
}

/// A slot's change of state, with the ledger's figures right after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The slot.
    pub slot: SlotId,
    /// Its model.
    pub model: ModelName,
    /// The state before.
    pub from: Phase,
    /// The state after.
    pub to: Phase,
    /// Why.
    pub cause: Cause,
    /// When.
    pub at: Timestamp,
    /// How long the slot was in the state before.
    pub took: Duration,
    /// What the ledger holds for the slot.
    pub bytes: Bytes,
    /// Its estimate, while it holds anything.
    pub estimate: Option<Estimate>,
    /// What its load, and its steps since, were measured to take.
    pub measured: Option<Footprint>,
    /// What the ledger holds in all.
    pub used: Bytes,
    /// The budget.
    pub budget: Bytes,
    /// What may be held just now: the budget, or what the machine has memory for where that is less.
    pub limit: Bytes,
    /// What of it loads may still take.
    pub left: Bytes,
    /// LLMs loaded or loading.
    pub llms: usize,
}

impl Slot {
    pub(super) fn new(spec: SlotSpec) -> Self {
        Self {
            pinned: spec.class == Class::Resident,
            spec,
            state: State::Absent,
            phase: Phase::Absent,
            since: Timestamp::default(),
            failures: 0,
            backoff: None,
            shortened: None,
            took: None,
            last_load: None,
            last_unload: None,
            last_resize: None,
            evicted: None,
            uses: (0.0, 0),
            unload_waiters: Vec::new(),
        }
    }

    /// Takes the state out, to be put back by the caller in the same call.
    pub(super) fn take_state(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Absent)
    }

    /// Whether it counts for the limit on LLMs.
    pub(super) fn counts(&self) -> bool {
        self.spec.llm && self.state.held().is_some()
    }

    /// Its uses after so many of all models, each counting half as much for every half-life.
    pub(super) fn uses_after(&self, grants: u64) -> f64 {
        let (uses, counted) = self.uses;
        uses * 0.5_f64.powf((grants - counted) as f64 / HALF_LIFE)
    }

    /// An estimate, no lower than what the last load took more than was reserved for it, where that had no longer a context
    /// and was not long ago.
    pub(super) fn at_least_what_it_took(&self, estimate: Estimate, now: Timestamp) -> Estimate {
        let still = |took: &Took| now.since(took.at) < TAKES_MORE && estimate.n_ctx >= took.n_ctx;
        let more = |bytes: &Bytes| *bytes > estimate.reserve();
        let took = self.took.filter(still).map(|took| took.bytes).filter(more);
        Estimate { measured_before: took.or(estimate.measured_before), ..estimate }
    }

    /// When its TTL ends, if it is idle and may be unloaded for that.
    pub(super) fn expires_at(&self) -> Option<Timestamp> {
        match (&self.state, self.spec.ttl) {
            (State::Ready { leases: 0, idle_since, .. }, Some(ttl)) if !self.pinned => {
                Some(*idle_since + ttl)
            }
            _ => None,
        }
    }

    /// Until when it is no victim, although idle: a model that had to leave for others, and was loaded again soon after, is
    /// left to those who want it for as long as its load took. Else two models that push each other out would do little
    /// but load.
    pub(super) fn stays_until(&self) -> Option<Timestamp> {
        let ((started, ended), evicted) = (self.last_load?, self.evicted?);
        let churns = started.since(evicted) < CHURN;
        churns.then(|| ended + ended.since(started).min(LONGEST_STAY))
    }

    /// The error for requests that come too soon after a failed load.
    pub(super) fn backoff_error(&self, now: Timestamp) -> Option<Error> {
        let backoff = self.backoff.as_ref().filter(|backoff| backoff.until > now)?;
        Some(Error::LoadBackoff {
            model: self.spec.model.clone(),
            retry_in: backoff.until.since(now),
            cause: backoff.cause.clone(),
        })
    }

    /// How much of the time since `arrived` went into this slot's last load.
    pub(super) fn loading_since(&self, arrived: Timestamp) -> Duration {
        self.last_load.map_or(Duration::ZERO, |(started, ended)| ended.since(started.max(arrived)))
    }
}

impl Held {
    /// The contexts that it can have, longest first.
    pub(super) fn contexts(&self) -> impl Iterator<Item = &Estimate> {
        let whole = self.whole.as_deref().unwrap_or(&self.estimate);
        std::iter::once(whole).chain(&whole.shorter)
    }

    /// The longest context with which it holds so much less, or else the shortest; none where it has no shorter one.
    pub(super) fn shorter(&self, saving: Bytes) -> Option<&Estimate> {
        let shorter = || self.contexts().filter(|other| self.estimate.saves(other) > Bytes::ZERO);
        shorter().find(|other| self.estimate.saves(other) >= saving).or_else(|| shorter().last())
    }
}

impl State {
    pub(super) fn phase(&self) -> Phase {
        match self {
            Self::Absent => Phase::Absent,
            Self::Estimating { .. } => Phase::Estimating,
            Self::Sized { .. } => Phase::Waiting,
            Self::Loading { .. } => Phase::Loading,
            Self::Resizing { .. } => Phase::Resizing,
            Self::Ready { .. } => Phase::Ready,
            Self::Unloading { .. } => Phase::Unloading,
        }
    }

    pub(super) fn held(&self) -> Option<&Held> {
        match self {
            Self::Loading { held, .. }
            | Self::Ready { held, .. }
            | Self::Resizing { held, .. }
            | Self::Unloading { held, .. } => Some(held),
            Self::Absent | Self::Estimating { .. } | Self::Sized { .. } => None,
        }
    }
}

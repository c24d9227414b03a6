//! What the pool did meanwhile, and what has to hold.

use futures::StreamExt;
use sarai::{PoolEvent, Sarai};
use sarai_core::scheduler::{Cause, Phase};
use sarai_core::units::Bytes;
use tokio::task::JoinHandle;

/// What the pool did, as its events tell.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) loads: usize,
    pub(crate) evictions: usize,
    pub(crate) shortened: usize,
    pub(crate) lengthened: usize,
    /// The most that the ledger held beyond the budget.
    pub(crate) over: Bytes,
}

/// Counts what the pool does until the pool is gone.
pub(crate) fn tally(sarai: &Sarai) -> JoinHandle<Tally> {
    let mut events = sarai.pool().events();
    tokio::spawn(async move {
        let mut tally = Tally::default();
        while let Some(event) = events.next().await {
            let PoolEvent::Slot(change) = event else { continue };
            let is = |from, to| change.from == from && change.to == to;
            tally.loads += usize::from(is(Phase::Loading, Phase::Ready));
            tally.evictions +=
                usize::from(is(Phase::Ready, Phase::Unloading) && change.cause == Cause::Evicted);
            let resized = is(Phase::Ready, Phase::Resizing);
            tally.shortened += usize::from(resized && change.cause == Cause::Shortened);
            tally.lengthened += usize::from(resized && change.cause == Cause::Lengthened);
            tally.over = tally.over.max(change.used.saturating_sub(change.budget));
        }
        tally
    })
}

/// Checks what has to hold, and says what was seen.
#[derive(Debug)]
pub(crate) struct Checks(Vec<String>);

impl Checks {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn check(&mut self, holds: bool, what: String) {
        println!("{} {what}", if holds { "ok  " } else { "FAIL" });
        if !holds {
            self.0.push(what);
        }
    }

    /// Those that failed.
    pub(crate) fn failed(self) -> Vec<String> {
        self.0
    }
}

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use crate::memory::{Others, SharedBudget};
use crate::units::Bytes;

/// How often it is looked what other processes hold and want.
const LOOK: Duration = Duration::from_secs(1);

/// The pool's part in a budget that several processes share. Where their folder cannot be used any more, that is said once
/// and the pool goes on with its own budget: the machine's memory bounds it still.
#[derive(Debug)]
pub(super) struct Sharing {
    budget: SharedBudget,
    pub(super) next_look: Instant,
    stated: (Bytes, Bytes),
    failing: bool,
}

impl Sharing {
    pub(super) fn new(budget: SharedBudget) -> Self {
        Self { budget, next_look: Instant::now(), stated: Default::default(), failing: false }
    }

    /// Holds so much from now on, unless the others leave too little of `budget`.
    pub(super) fn hold(&mut self, used: Bytes, budget: Bytes) -> Result<(), Others> {
        let held = self.budget.hold(used, budget);
        self.worked(held).unwrap_or(Ok(()))
    }

    /// Writes down what the pool holds and waits for, where that has changed.
    pub(super) fn state(&mut self, used: Bytes, wanted: Bytes) {
        if self.stated != (used, wanted) {
            let stated = self.budget.state(used, wanted);
            if self.worked(stated).is_some() {
                self.stated = (used, wanted);
            }
        }
    }

    /// What the others have.
    pub(super) fn look(&mut self) -> Option<Others> {
        self.next_look = Instant::now() + LOOK;
        let others = self.budget.others();
        self.worked(others)
    }

    fn worked<T>(&mut self, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(value) => {
                self.failing = false;
                Some(value)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, "the shared budget cannot be used: this process goes on with its own");
                }
                None
            }
        }
    }
}

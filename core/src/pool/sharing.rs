use std::io;
use std::time::Duration;

use tokio::time::Instant;

use crate::memory::{Others, SharedBudget};
use crate::units::Bytes;

/// How often it is looked what other processes hold and want.
const LOOK: Duration = Duration::from_secs(1);

/// A process that keeps the lock for longer has stopped, and is not waited for.
const KEPT: Duration = Duration::from_secs(10);

/// The pool's part in a budget that several processes share. Where their folder cannot be used any more, that is said once
/// and the pool goes on with its own budget, as if there were nobody else: the machine's memory bounds it still. It is tried
/// again at each look.
#[derive(Debug)]
pub(super) struct Sharing {
    budget: SharedBudget,
    pub(super) next_look: Instant,
    /// What is written down: held and wanted.
    stated: Option<(Bytes, Bytes)>,
    /// Since when somebody else had the lock, each time that it was tried for.
    busy_since: Option<Instant>,
    failing: bool,
}

impl Sharing {
    pub(super) fn new(budget: SharedBudget) -> Self {
        Self { budget, next_look: Instant::now(), stated: None, busy_since: None, failing: false }
    }

    /// Holds so much from now on, unless the others leave too little of `budget`.
    pub(super) fn hold(&mut self, used: Bytes, budget: Bytes) -> Result<(), Others> {
        if self.failing {
            return Ok(());
        }
        let held = self.budget.hold(used, budget);
        self.worked(held, Duration::ZERO).unwrap_or(Ok(()))
    }

    /// Writes down what the pool holds and waits for, where that has changed. What cannot be written just now is at the next
    /// look.
    pub(super) fn state(&mut self, used: Bytes, wanted: Bytes) {
        if !self.failing && self.stated != Some((used, wanted)) {
            let stated = self.budget.state(used, wanted);
            self.stated = self.worked(stated, KEPT).map(|()| (used, wanted));
        }
    }

    /// What the others have, where that is not as before; nothing where it cannot be told.
    pub(super) fn look(&mut self) -> Option<Others> {
        self.next_look = Instant::now() + LOOK;
        let others = self.budget.others();
        let others = self.worked(others, KEPT);
        others.or_else(|| self.failing.then(Others::default))
    }

    /// `patience` is how long somebody else may have the lock before that is a failure.
    fn worked<T>(&mut self, result: io::Result<T>, patience: Duration) -> Option<T> {
        match result {
            Ok(value) => {
                self.busy_since = None;
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the shared budget can be used again");
                }
                Some(value)
            }
            Err(error) if self.is_busy(&error, patience) => {
                self.stated = None;
                None
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, "the shared budget cannot be used: this process goes on with its own");
                    // What the others had is not to be reckoned with any more.
                    self.next_look = Instant::now();
                }
                self.stated = None;
                None
            }
        }
    }

    fn is_busy(&mut self, error: &io::Error, patience: Duration) -> bool {
        if error.kind() != io::ErrorKind::WouldBlock {
            self.busy_since = None;
            return false;
        }
        let since = *self.busy_since.get_or_insert_with(Instant::now);
        !self.failing && since.elapsed() < patience
    }
}

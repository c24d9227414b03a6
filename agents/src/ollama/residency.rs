use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Which models a host holds in memory, as far as is known: by what it said last, and by the answers it has given since.
#[derive(Debug, Default)]
pub(super) struct Residency {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Until when each is surely kept, unless the host has to make room.
    until: BTreeMap<String, Instant>,
    /// Whether the host has said what it holds; before that, a model that is not among these may be there all the same.
    listed: bool,
}

impl Residency {
    /// Whether the host holds a model, by the name that it lists it under.
    pub(super) fn of(&self, name: &str) -> Option<bool> {
        let known = self.known();
        let held = known.until.get(name).is_some_and(|until| *until > Instant::now());
        (held || known.listed).then_some(held)
    }

    /// It has just answered with a model, and keeps it for so long.
    pub(super) fn used(&self, name: String, keep_alive: Duration) {
        self.known().until.insert(name, later(keep_alive));
    }

    pub(super) fn gone(&self, name: &str) {
        self.known().until.remove(name);
    }

    /// It says that it holds these. Until when each is kept it says by its own clock; for a choice among hosts it is enough
    /// to believe it for so long.
    pub(super) fn listed(&self, names: impl Iterator<Item = String>, believed: Duration) {
        let until = later(believed);
        *self.known() = Known { until: names.map(|name| (name, until)).collect(), listed: true };
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing panics while it is held.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn later(keeps: Duration) -> Instant {
    // "For ever" is centuries, which an Instant need not hold.
    Instant::now() + keeps.min(Duration::from_hours(24 * 365))
}

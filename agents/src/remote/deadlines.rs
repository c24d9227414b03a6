use std::time::Duration;

use tokio::time::Instant;

/// When a request's stages have to be over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    pub(crate) first: Instant,
    pub(crate) stall: Duration,
    pub(crate) total: Instant,
    /// The first and the last as they were set, for errors.
    pub(crate) limits: (Duration, Duration),
}

impl Deadlines {
    /// Deadlines that begin now.
    pub(crate) fn new(first: Duration, stall: Duration, total: Duration) -> Self {
        let now = Instant::now();
        Self { first: now + first, stall, total: now + total, limits: (first, total) }
    }

    /// One deadline for everything.
    pub(crate) fn within(limit: Duration) -> Self {
        Self::new(limit, limit, limit)
    }

    /// The same with this much more time for the first token.
    pub(crate) fn with_more_for_first(self, more: Duration) -> Self {
        let (first, total) = self.limits;
        Self { first: self.first + more, limits: (first + more, total), ..self }
    }

    pub(crate) fn until_first(&self) -> Instant {
        self.first.min(self.total)
    }
}

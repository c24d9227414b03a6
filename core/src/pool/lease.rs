use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Inner;
use super::driver::{Command, Granted};
use crate::answer::{Priority, Provenance};
use crate::backend::Model;
use crate::error::Error;
use crate::request::Capability;
use crate::scheduler::{RequestId, SlotId};

/// The right to use a ready model. While it lives the model is not evicted; dropping it gives its place free.
#[must_use = "dropping a lease returns it at once"]
pub struct Lease {
    pub(super) slot: SlotId,
    pub(super) provenance: Provenance,
    model: Arc<dyn Model>,
    _ticket: Ticket,
}

/// A request's place with the driver, from its arrival to the end of its use. Its drop says that the request is over,
/// whatever had become of it; it cannot fail, because its place in the channel was reserved at the start.
struct Ticket {
    id: RequestId,
    permit: Option<OwnedPermit<RequestId>>,
}

/// What a lease is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) capability: Capability,
    pub(super) priority: Priority,
    pub(super) deadline: Instant,
}

impl Lease {
    /// Waits for a slot's turn.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future leaves the queue, and gives up a load that nobody else waits for.
    pub(super) async fn acquire(inner: &Inner, slot: SlotId, wanted: Wanted) -> Result<Self, Error> {
        let permit = inner.returns.clone().try_reserve_owned().map_err(|error| match error {
            TrySendError::Full(returns) => Error::QueueFull { waiting: returns.max_capacity() },
            TrySendError::Closed(_) => Error::ShuttingDown,
        })?;
        let ticket = Ticket { id: inner.next_request(), permit: Some(permit) };
        // Declared after the ticket, so dropped before it: by the time the driver hears of the return, it can see
        // that nobody waits for the grant any more.
        let (reply, granted) = oneshot::channel();
        inner.send(Command::Request { id: ticket.id, slot, wanted, reply }).await?;
        let Granted { model, queued, loading } = granted.await.map_err(|_| Error::ShuttingDown)??;
        let provenance = Provenance {
            served_by: inner.shared.slots[slot.0].backend.served_by(),
            fallback_reason: None,
            queue_ms: queued.as_millis() as u64,
            load_ms: loading.as_millis() as u64,
            n_ctx: model.n_ctx(),
        };
        Ok(Self { slot, provenance, model, _ticket: ticket })
    }

    /// Who serves it, why, and how long that took.
    #[must_use]
    pub fn provenance(this: &Self) -> &Provenance {
        &this.provenance
    }
}

impl Deref for Lease {
    type Target = dyn Model;

    fn deref(&self) -> &Self::Target {
        &*self.model
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("provenance", &self.provenance).finish_non_exhaustive()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            permit.send(self.id);
        }
    }
}

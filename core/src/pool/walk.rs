use crate::answer::CallOptions;
use crate::backend::ServedBy;
use crate::error::Error;
use crate::failure::Failure;
use crate::request::Capability;
use crate::scheduler::SlotId;
use crate::units::ModelName;

use super::Inner;
use super::events::PoolEvent;
use super::lease::{Lease, Wanted};
use super::metrics::fallback_reason;

/// One request's way over the places of its model, until one answers. It never waits for a lease while it holds
/// another: a place that failed is given back first.
pub(super) struct Walk<'a> {
    inner: &'a Inner,
    model: &'a ModelName,
    rest: std::slice::Iter<'a, SlotId>,
    wanted: Wanted,
    /// What has failed so far, once something has.
    failed: Option<Failed>,
}

struct Failed {
    /// The first choice's error.
    first: Error,
    /// All places that failed and why, in order.
    reason: String,
    /// The last of them, and the kind of its failure.
    last: ServedBy,
    kind: &'static str,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        inner: &'a Inner,
        model: &'a ModelName,
        capability: Capability,
        options: CallOptions,
    ) -> Result<Self, Error> {
        let (model, entry) = inner.entry(model.as_str())?;
        let wanted =
            Wanted { capability, priority: options.priority, deadline: inner.deadline(options.wait_timeout) };
        Ok(Self { inner, model, rest: entry.chain.iter(), wanted, failed: None })
    }

    /// A lease of the next place that can be had.
    pub(super) async fn lease(&mut self) -> Result<Lease, Error> {
        loop {
            let Some(slot) = self.rest.next().copied() else { return Err(Error::ShuttingDown) };
            self.announce(slot);
            match Lease::acquire(self.inner, slot, self.wanted).await {
                Ok(mut lease) => {
                    lease.provenance.fallback_reason =
                        self.failed.as_ref().map(|failed| failed.reason.clone());
                    return Ok(lease);
                }
                Err(error) => self.failed(slot, error)?,
            }
        }
    }

    /// The place failed before it gave any text: goes on to the next one, or gives the error that ends the request.
    pub(super) fn request_failed(&mut self, slot: SlotId, cause: Failure) -> Result<(), Error> {
        let served_by = self.inner.shared.slots[slot.0].backend.served_by();
        self.failed(slot, Error::Request { model: self.model.clone(), served_by, cause })
    }

    fn failed(&mut self, slot: SlotId, error: Error) -> Result<(), Error> {
        let last_resort = self.rest.len() == 0;
        let allows_fallback = error.allows_fallback();
        let served_by = self.inner.shared.slots[slot.0].backend.served_by();
        let (reason, kind) = (reason(&served_by, &error), fallback_reason(&error));
        self.failed = match (self.failed.take(), allows_fallback && !last_resort) {
            (None, false) => return Err(error),
            (Some(Failed { first, .. }), false) => {
                let (first, last) = (Box::new(first), Box::new(error));
                return Err(Error::FallbackFailed { model: self.model.clone(), first, last });
            }
            (None, true) => Some(Failed { first: error, reason, last: served_by, kind }),
            (Some(before), true) => {
                let reason = format!("{}; {reason}", before.reason);
                Some(Failed { first: before.first, reason, last: served_by, kind })
            }
        };
        Ok(())
    }

    /// Makes a fallback visible when it happens.
    fn announce(&self, to: SlotId) {
        let Some(failed) = &self.failed else { return };
        let shared = &self.inner.shared;
        let to = shared.slots[to.0].backend.served_by();
        tracing::warn!(model = %self.model, from = %failed.last, %to, reason = failed.reason, "falling back");
        shared.metrics.on_fallback(self.model, &failed.last, &to, failed.kind);
        shared.emit(PoolEvent::Fallback {
            model: self.model.clone(),
            from: failed.last.clone(),
            to,
            reason: failed.reason.clone(),
        });
    }
}

/// The place and its failure, without the model's name: the caller knows which model was asked.
fn reason(served_by: &ServedBy, error: &Error) -> String {
    match error {
        Error::Request { cause, .. } | Error::Load { cause, .. } => format!("{served_by}: {cause}"),
        other => format!("{served_by}: {other}"),
    }
}

use std::time::Duration;

use tokio::time::Instant;

use super::Inner;
use super::events::PoolEvent;
use super::lease::{Lease, Wanted};
use super::metrics::fallback_reason;
use crate::answer::{CallOptions, Priority};
use crate::backend::ServedBy;
use crate::error::Error;
use crate::failure::Failure;
use crate::request::Capability;
use crate::scheduler::SlotId;
use crate::units::ModelName;

/// One request's way over the places of its model, until one answers. It never waits for a lease while it holds
/// another: a place that failed is given back first.
pub(super) struct Walk<'a> {
    inner: &'a Inner,
    model: &'a ModelName,
    rest: std::slice::Iter<'a, SlotId>,
    capability: Capability,
    priority: Priority,
    /// When the request gives up waiting for a place.
    deadline: Instant,
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
        Ok(Self {
            inner,
            model,
            rest: entry.chain.iter(),
            capability,
            priority: options.priority,
            deadline: inner.deadline(options.wait_timeout),
            failed: None,
        })
    }

    /// Puts the request to one place after the other until one answers. `ask` is over as soon as nothing can fail any
    /// more that a fallback could make good.
    pub(super) async fn ask<T, F>(mut self, ask: impl Fn(Lease) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        loop {
            let lease = self.lease().await?;
            let slot = lease.slot;
            let cause = match ask(lease).await {
                Ok(answer) => return Ok(answer),
                Err(cause) => cause,
            };
            let served_by = self.served_by(slot);
            self.failed(slot, Error::Request { model: self.model.clone(), served_by, cause })?;
        }
    }

    /// A lease of the next place that can be had.
    pub(super) async fn lease(&mut self) -> Result<Lease, Error> {
        loop {
            let places = self.rest.len();
            let Some(slot) = self.rest.next().copied() else { return Err(Error::ShuttingDown) };
            self.announce(slot);
            let deadline = self.deadline_among(places);
            let wanted = Wanted { capability: self.capability, priority: self.priority, deadline };
            match Lease::acquire(self.inner, slot, wanted).await {
                Ok(mut lease) => {
                    lease.provenance.fallback_reason =
                        self.failed.as_ref().map(|failed| failed.reason.clone());
                    return Ok(lease);
                }
                Err(error) => self.failed(slot, error)?,
            }
        }
    }

    /// When to go on to the next place: each of those left gets an equal share of the time, so that a busy first
    /// choice leaves some for a free second one.
    fn deadline_among(&self, places: usize) -> Instant {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let share = u32::try_from(places).ok().and_then(|places| left.checked_div(places));
        self.deadline - left.saturating_sub(share.unwrap_or(Duration::ZERO))
    }

    fn failed(&mut self, slot: SlotId, error: Error) -> Result<(), Error> {
        let last_resort = self.rest.len() == 0;
        let allows_fallback = error.allows_fallback();
        let served_by = self.served_by(slot);
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
        let to = self.served_by(to);
        tracing::warn!(model = %self.model, from = %failed.last, %to, reason = failed.reason, "falling back");
        shared.metrics.on_fallback(self.model, &failed.last, &to, failed.kind);
        shared.emit(PoolEvent::Fallback {
            model: self.model.clone(),
            from: failed.last.clone(),
            to,
            reason: failed.reason.clone(),
        });
    }

    fn served_by(&self, slot: SlotId) -> ServedBy {
        self.inner.shared.slots[slot.0].backend.served_by()
    }
}

/// The place and its failure, without the model's name: the caller knows which model was asked.
fn reason(served_by: &ServedBy, error: &Error) -> String {
    match error {
        Error::Request { cause, .. } | Error::Load { cause, .. } => format!("{served_by}: {cause}"),
        other => format!("{served_by}: {other}"),
    }
}

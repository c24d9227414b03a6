use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;

use super::Inner;
use super::events::PoolEvent;
use super::lease::{Lease, Wanted};
use super::metrics::fallback_reason;
use crate::answer::{CallOptions, Priority, Provenance};
use crate::backend::{Asked, Model, ServedBy};
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::request::Capability;
use crate::scheduler::SlotId;
use crate::units::ModelName;

/// What is loaded before it is asked for, as a substitute while a host is slow, takes no room from a model that was used
/// within this time.
pub(super) const SPARED: Duration = Duration::from_mins(1);

/// One request's way over the places of its model, and over the hosts of each, until one answers. It never waits for a lease
/// while it needs another: a place that failed is given back first.
pub(super) struct Walk {
    inner: Arc<Inner>,
    model: ModelName,
    /// The next place in the model's chain.
    next: usize,
    capability: Capability,
    priority: Priority,
    conversation: Option<u64>,
    /// When the request gives up waiting for a place. The time that places take for their answers is not counted.
    deadline: Instant,
    wait: Option<Duration>,
    /// The place whose hosts are being tried, and those of them that have failed.
    place: Option<Arc<Lease>>,
    failed_hosts: Vec<ServedBy>,
    /// What has failed so far, in order.
    failed: Vec<Failed>,
    /// Whether another place's answer is to be gone on with: then no failure is the request's own.
    resumes: bool,
    /// The next place's load, begun before it is needed.
    warming: Option<BoxFuture<'static, ()>>,
}

struct Failed {
    by: ServedBy,
    error: Error,
}

/// A place, or one of its hosts, to put the request to.
pub(super) struct Attempt {
    /// Dropped before the lease: a host's place is free, then the model's.
    pub(super) model: Arc<dyn Model>,
    pub(super) lease: Arc<Lease>,
    pub(super) provenance: Provenance,
    /// Whether it is a local place that stands in for the first choice.
    pub(super) stands_in: bool,
}

impl Walk {
    pub(super) fn new(
        inner: &Arc<Inner>,
        model: &ModelName,
        capability: Capability,
        conversation: Option<u64>,
        options: CallOptions,
    ) -> Result<Self, Error> {
        let (model, _) = inner.entry(model.as_str())?;
        Ok(Self {
            model: model.clone(),
            next: 0,
            capability,
            priority: options.priority,
            conversation,
            deadline: inner.deadline(options.wait_timeout),
            wait: options.wait_timeout,
            place: None,
            failed_hosts: Vec::new(),
            failed: Vec::new(),
            resumes: false,
            warming: None,
            inner: Arc::clone(inner),
        })
    }

    /// Puts the request to one place after the other until one answers. `ask` is over as soon as nothing can fail any
    /// more that a fallback could make good.
    pub(super) async fn ask<T, F>(&mut self, ask: impl Fn(Attempt) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        loop {
            let attempt = self.attempt().await?;
            let served_by = attempt.provenance.served_by.clone();
            let (on_host, asked) = (self.place.is_some(), Instant::now());
            let cause = match self.watched(on_host, ask(attempt)).await {
                Ok(answer) => {
                    self.warming = None;
                    return Ok(answer);
                }
                Err(cause) => cause,
            };
            self.deadline += asked.elapsed();
            self.failed_hosts.push(served_by.clone());
            self.note(served_by, cause)?;
        }
    }

    /// Goes on after an answer's place has failed in the middle of it.
    pub(super) fn resume(&mut self, by: ServedBy, cause: Failure) -> Result<(), Error> {
        self.resumes = true;
        self.deadline = self.inner.deadline(self.wait);
        self.failed_hosts.push(by.clone());
        self.note(by, cause)
    }

    /// A lease of the next place that can be had.
    pub(super) async fn lease(&mut self) -> Result<Lease, Error> {
        loop {
            let (slot, left) = match self.rest() {
                [] => return Err(self.given_up()),
                [slot, after @ ..] => (*slot, after.len()),
            };
            self.next += 1;
            self.failed_hosts.clear();
            if left > 0
                && let Err(cause) = self.inner.shared.slots[slot.0].backend.available()
            {
                self.note(self.name_of(slot), cause)?;
                continue;
            }
            let deadline = self.deadline_among(left + 1);
            let wanted =
                Wanted { capability: self.capability, priority: self.priority, deadline, spare: None };
            match self.acquire(slot, wanted).await {
                Ok(mut lease) => {
                    lease.provenance.fallback_reason = self.reason();
                    return Ok(lease);
                }
                Err(error) => self.failed(self.name_of(slot), error)?,
            }
        }
    }

    /// The next place, or the next host of the present one.
    async fn attempt(&mut self) -> Result<Attempt, Error> {
        loop {
            let lease = match &self.place {
                Some(lease) => Arc::clone(lease),
                None => Arc::new(self.lease().await?),
            };
            let mut provenance = lease.provenance().clone();
            provenance.fallback_reason = self.reason();
            let inner = Arc::clone(&self.inner);
            let Some(hosts) = inner.shared.slots[lease.slot.0].backend.hosts() else {
                self.announce(&provenance.served_by);
                let stands_in = self.next > 1;
                return Ok(Attempt { model: Arc::clone(lease.model()), lease, provenance, stands_in });
            };
            let last_resort = self.rest().is_empty();
            let asked = Asked { conversation: self.conversation, failed: &self.failed_hosts, last_resort };
            let until = self.deadline_among(self.rest().len() + 1);
            let mut warming = self.warming.take();
            let next = beside(&mut warming, tokio::time::timeout_at(until, hosts.next(asked))).await;
            self.warming = warming;
            let full = |_| Failure::new(FailureKind::Busy, "none of its hosts had a place free in time");
            match next.map_err(full).flatten() {
                Ok(Some(host)) => {
                    provenance.served_by = host.served_by;
                    provenance.n_ctx = host.model.n_ctx();
                    self.announce(&provenance.served_by);
                    self.place = Some(Arc::clone(&lease));
                    return Ok(Attempt { model: host.model, lease, provenance, stands_in: false });
                }
                // All of them have failed.
                Ok(None) => self.place = None,
                Err(cause) => {
                    self.place = None;
                    self.note(provenance.served_by, cause)?;
                }
            }
        }
    }

    /// Waits for a host's answer; where that takes long and the model's configuration says so, the next place is made ready
    /// meanwhile, as far as there is room.
    async fn watched<T>(
        &mut self,
        on_host: bool,
        answer: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let (_, entry) = self.inner.entry(self.model.as_str()).map_err(gone)?;
        let hedge_after = entry.hedge_after;
        if self.warming.is_some() {
            let mut warming = self.warming.take();
            let answer = beside(&mut warming, answer).await;
            self.warming = warming;
            return answer;
        }
        let (Some(after), Some(next), true) = (hedge_after, self.rest().first().copied(), on_host) else {
            return answer.await;
        };
        tokio::pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            () = tokio::time::sleep(after) => {}
        }
        let mut warming = self.warm_up(next);
        tokio::select! {
            biased;
            answer = &mut answer => {
                // Where the host fails now, the load that has begun is waited for.
                self.warming = answer.is_err().then_some(warming);
                answer
            }
            () = &mut warming => answer.await,
        }
    }

    fn warm_up(&self, slot: SlotId) -> BoxFuture<'static, ()> {
        let (inner, deadline) = (Arc::clone(&self.inner), self.deadline);
        let wanted = Wanted {
            capability: self.capability,
            priority: Priority::Background,
            deadline,
            spare: Some(SPARED),
        };
        tracing::info!(model = %self.model, next = %self.name_of(slot), "the host is slow: the next place is made ready");
        Box::pin(async move {
            if let Err(error) = Lease::acquire(&inner, slot, wanted).await {
                tracing::debug!(%error, "the next place could not be made ready");
            }
        })
    }

    /// Waits for a slot, beside a load of it that may have begun: dropped before, that would be given up.
    async fn acquire(&mut self, slot: SlotId, wanted: Wanted) -> Result<Lease, Error> {
        let mut warming = self.warming.take();
        beside(&mut warming, Lease::acquire(&self.inner, slot, wanted)).await
    }

    /// The places that were not tried yet.
    fn rest(&self) -> &[SlotId] {
        let chain = self.inner.models.get(&self.model).map(|entry| entry.chain.as_slice());
        chain.and_then(|chain| chain.get(self.next..)).unwrap_or_default()
    }

    /// When to go on to the next place: each of those left gets an equal share of the time, so that a busy first
    /// choice leaves some for a free second one.
    fn deadline_among(&self, places: usize) -> Instant {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let share = u32::try_from(places).ok().and_then(|places| left.checked_div(places));
        self.deadline - left.saturating_sub(share.unwrap_or(Duration::ZERO))
    }

    fn note(&mut self, by: ServedBy, cause: Failure) -> Result<(), Error> {
        let error = Error::Request { model: self.model.clone(), served_by: by.clone(), cause };
        self.failed(by, error)
    }

    /// Takes a failure in; gives it back where nobody else may answer instead.
    fn failed(&mut self, by: ServedBy, error: Error) -> Result<(), Error> {
        let ends = !self.resumes && !error.allows_fallback();
        self.failed.push(Failed { by, error });
        if ends { Err(self.given_up()) } else { Ok(()) }
    }

    /// The error of a request that nobody answers.
    fn given_up(&mut self) -> Error {
        let mut failed = std::mem::take(&mut self.failed).into_iter().map(|failed| failed.error);
        match (failed.next(), failed.last()) {
            (Some(first), Some(last)) => Error::FallbackFailed {
                model: self.model.clone(),
                first: Box::new(first),
                last: Box::new(last),
            },
            (Some(only), None) => only,
            // A chain is never empty.
            (None, _) => Error::ShuttingDown,
        }
    }

    /// All that has failed and why, in order.
    fn reason(&self) -> Option<String> {
        let mut text = String::new();
        for Failed { by, error } in &self.failed {
            let separator = if text.is_empty() { "" } else { "; " };
            // Without the model's name: the caller knows which model was asked.
            let _infallible = match error {
                Error::Request { cause, .. } | Error::Load { cause, .. } => {
                    write!(text, "{separator}{by}: {cause}")
                }
                other => write!(text, "{separator}{by}: {other}"),
            };
        }
        (!text.is_empty()).then_some(text)
    }

    /// Makes a fallback visible when it happens.
    fn announce(&self, to: &ServedBy) {
        let (Some(Failed { by, error }), Some(reason)) = (self.failed.last(), self.reason()) else { return };
        let shared = &self.inner.shared;
        tracing::warn!(model = %self.model, from = %by, %to, reason, "falling back");
        shared.metrics.on_fallback(&self.model, by, to, fallback_reason(error));
        shared.emit(PoolEvent::Fallback {
            model: self.model.clone(),
            from: by.clone(),
            to: to.clone(),
            reason,
        });
    }

    fn name_of(&self, slot: SlotId) -> ServedBy {
        self.inner.shared.slots[slot.0].backend.served_by()
    }
}

/// Does the one while the other goes on: what it has got must not wait for somebody to look.
async fn beside<T>(warming: &mut Option<BoxFuture<'static, ()>>, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if let Some(other) = warming {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = other => *warming = None,
        }
    }
    work.await
}

fn gone(error: Error) -> Failure {
    Failure::new(FailureKind::Cancelled, error)
}

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Inner;
use super::driver::{Command, Granted};
use crate::answer::{Priority, Provenance};
use crate::backend::Model;
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::request::{Capability, Delta, Embeddings, GenerateRequest, LabelScore, TranscribeRequest};
use crate::scheduler::{RequestId, SlotId};
use crate::units::ModelName;

/// The right to use a ready model. While it lives the model is not evicted; dropping it gives its place free.
///
/// Requests on a lease run on the one place that it holds: they have no fallback.
#[must_use = "dropping a lease returns it at once"]
pub struct Lease {
    pub(super) slot: SlotId,
    pub(super) provenance: Provenance,
    name: ModelName,
    model: Arc<dyn Model>,
    ticket: Ticket,
}

/// A request's place with the driver, from its arrival to the end of its use. Its drop says that the request is over,
/// whatever had become of it; it cannot fail, because its place in the channel was reserved at the start.
struct Ticket {
    id: RequestId,
    slot: SlotId,
    lost: OnceLock<Lost>,
    permit: Option<OwnedPermit<Returned>>,
}

/// A request is over.
pub(super) struct Returned {
    pub(super) id: RequestId,
    pub(super) slot: SlotId,
    pub(super) lost: Option<Lost>,
}

/// A slot whose engine turned out to have ended, and what told so.
pub(super) struct Lost {
    pub(super) slot: SlotId,
    pub(super) cause: Failure,
}

/// What a lease is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) capability: Capability,
    pub(super) priority: Priority,
    pub(super) deadline: Instant,
    /// Whom it takes no room from: models that were used within this time.
    pub(super) spare: Option<Duration>,
}

impl Lease {
    /// Waits for a slot's turn.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future leaves the queue, and gives up a load that nobody else waits for.
    pub(super) async fn acquire(inner: &Inner, slot: SlotId, wanted: Wanted) -> Result<Self, Error> {
        let permit = inner.returns.clone().try_reserve_owned().map_err(|error| match error {
            // There is one for every request that may run or wait.
            TrySendError::Full(_) => Error::QueueFull { waiting: inner.max_waiting },
            TrySendError::Closed(_) => Error::ShuttingDown,
        })?;
        let ticket = Ticket { id: inner.next_request(), slot, lost: OnceLock::new(), permit: Some(permit) };
        // Declared after the ticket, so dropped before it: by the time the driver hears of the return, it can see
        // that nobody waits for the grant any more.
        let (reply, granted) = oneshot::channel();
        inner.send(Command::Request { id: ticket.id, slot, wanted, reply }).await?;
        let Granted { model, queued, loading } = granted.await.map_err(|_| Error::ShuttingDown)??;
        let entry = &inner.shared.slots[slot.0];
        let provenance = Provenance {
            served_by: entry.backend.served_by(),
            fallback_reason: None,
            queue_ms: queued.as_millis() as u64,
            load_ms: loading.as_millis() as u64,
            n_ctx: model.n_ctx(),
        };
        Ok(Self { slot, provenance, name: entry.model.clone(), model, ticket })
    }

    /// Who serves it, why, and how long that took.
    #[must_use]
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Continues a prompt. The stream cannot outlive the lease; it ends with one [`Delta::Done`] or one error.
    ///
    /// # Errors
    /// The place refuses the request, or fails before it has an answer to stream.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future, or later the stream, stops the work.
    pub async fn generate(
        &self,
        request: GenerateRequest,
    ) -> Result<BoxStream<'_, Result<Delta, Error>>, Error> {
        let tokens = self.model.generate(request).await.map_err(|cause| self.error(cause))?;
        Ok(tokens.map(|delta| delta.map_err(|cause| self.error(cause))).boxed())
    }

    /// Writes down what is said in audio; see [`Lease::generate`].
    ///
    /// # Errors
    /// The place cannot do it, the audio cannot be read or has nothing to transcribe, or the place fails.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future, or later the stream, stops the work.
    pub async fn transcribe(
        &self,
        request: TranscribeRequest,
    ) -> Result<BoxStream<'_, Result<Delta, Error>>, Error> {
        let tokens = self.model.transcribe(request).await.map_err(|cause| self.error(cause))?;
        Ok(tokens.map(|delta| delta.map_err(|cause| self.error(cause))).boxed())
    }

    /// Embeds texts; the vectors come in the texts' order, each of length 1.
    ///
    /// # Errors
    /// The place cannot do it, or fails.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn embed(&self, texts: Vec<String>) -> Result<Embeddings, Error> {
        self.model.embed(texts).await.map_err(|cause| self.error(cause))
    }

    /// Scores a text for the labels of the model's classification head, highest first.
    ///
    /// # Errors
    /// The place cannot do it, or fails.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn classify(&self, text: String) -> Result<Vec<LabelScore>, Error> {
        self.model.classify(text).await.map_err(|cause| self.error(cause))
    }

    /// Scores each of `documents` for how well it answers `query`, from 0 to 1, in the documents' order.
    ///
    /// # Errors
    /// The place cannot do it, or fails.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn rerank(&self, query: String, documents: Vec<String>) -> Result<Vec<f32>, Error> {
        self.model.rerank(query, documents).await.map_err(|cause| self.error(cause))
    }

    /// The model itself. Its failures have to go through [`Lease::noted`].
    pub(super) fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    /// Looks whether a failure means that the model is gone, which the pool then hears with the lease's return.
    pub(super) fn noted(&self, cause: Failure) -> Failure {
        if cause.kind == FailureKind::EngineGone {
            // Told before: once is enough.
            let _told = self.ticket.lost.set(Lost { slot: self.slot, cause: cause.clone() });
        }
        cause
    }

    fn error(&self, cause: Failure) -> Error {
        let cause = self.noted(cause);
        Error::Request { model: self.name.clone(), served_by: self.provenance.served_by.clone(), cause }
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
            permit.send(Returned { id: self.id, slot: self.slot, lost: self.lost.take() });
        }
    }
}

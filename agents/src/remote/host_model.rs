use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use sarai_core::backend::Model;
use sarai_core::failure::Failure;
use sarai_core::memory::{Footprint, Freed};
use sarai_core::request::{
    Completion, Delta, Embeddings, FinishReason, GenerateRequest, TokenStream, TranscribeRequest,
};
use tokio::sync::OwnedSemaphorePermit;

use super::api::Deltas;
use super::backend::Place;
use super::seat::{Seat, Verdict};
use crate::Error;
use crate::text::Stops;

/// A model on the host that was chosen for a request, and one of the host's places.
#[derive(Debug)]
pub(super) struct HostModel {
    pub(super) place: Arc<Place>,
    pub(super) seat: Arc<Seat>,
    pub(super) _permit: OwnedSemaphorePermit,
}

#[async_trait]
impl Model for HostModel {
    fn n_ctx(&self) -> Option<u32> {
        self.place.n_ctx
    }

    fn memory(&self) -> Option<Footprint> {
        Some(Footprint::NONE)
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, Failure> {
        let mut verdict = self.seat.begin();
        let asked = self.seat.api.generate(&self.seat.model, self.place.n_ctx, &request).await;
        let deltas = match asked {
            Ok(deltas) => deltas,
            Err(error) => {
                verdict.failed(&error);
                return Err(self.seat.explained(error).await.into());
            }
        };
        let answer = HostAnswer {
            deltas,
            verdict,
            place: Arc::clone(&self.place),
            seat: Arc::clone(&self.seat),
            conversation: request.begins_conversation(),
            seam: request.prefill.map(|prefill| Stops::after(&request.sampling.stop, &prefill.text)),
            done: None,
        };
        Ok(answer.stream())
    }

    async fn transcribe(&self, request: TranscribeRequest) -> Result<TokenStream, Failure> {
        let mut verdict = self.seat.begin();
        match self.seat.api.transcribe(&self.seat.model, &request).await {
            Ok(deltas) => {
                let (place, seat) = (Arc::clone(&self.place), Arc::clone(&self.seat));
                let answer =
                    HostAnswer { deltas, verdict, place, seat, conversation: None, seam: None, done: None };
                Ok(answer.stream())
            }
            Err(error) => {
                verdict.failed(&error);
                Err(self.seat.explained(error).await.into())
            }
        }
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embeddings, Failure> {
        let mut verdict = self.seat.begin();
        match self.seat.api.embed(&self.seat.model, self.place.n_ctx, &texts).await {
            Ok(embeddings) => {
                verdict.succeeded();
                Ok(embeddings)
            }
            Err(error) => {
                verdict.failed(&error);
                Err(self.seat.explained(error).await.into())
            }
        }
    }

    async fn unload(&self) -> Option<Freed> {
        None
    }
}

/// A host's answer on its way.
struct HostAnswer {
    deltas: Deltas,
    verdict: Verdict,
    place: Arc<Place>,
    seat: Arc<Seat>,
    /// Where it is not remembered yet who has it.
    conversation: Option<u64>,
    /// Looks for stop texts that begin in what was said before: the host does not know of these.
    seam: Option<Stops>,
    /// The end, while held text goes before it.
    done: Option<Completion>,
}

impl HostAnswer {
    fn stream(self) -> TokenStream {
        futures::stream::unfold(Some(self), |answer| async {
            let mut answer = answer?;
            match answer.next().await {
                Ok(Delta::Text(text)) => Some((Ok(Delta::Text(text)), Some(answer))),
                Ok(end) => Some((Ok(end), None)),
                Err(error) => Some((Err(error.into()), None)),
            }
        })
        .boxed()
    }

    async fn next(&mut self) -> Result<Delta, Error> {
        if let Some(completion) = self.done.take() {
            return Ok(Delta::Done(completion));
        }
        loop {
            let cut_off = || Error::CutOff { host: self.seat.api.name().clone(), source: None };
            let delta = match self.deltas.next().await {
                Some(Ok(delta)) => delta,
                Some(Err(error)) => {
                    self.verdict.failed(&error);
                    return Err(error);
                }
                None => return Err(cut_off()),
            };
            match &delta {
                Delta::Text(_) => self.verdict.answers(),
                Delta::Done(_) => self.verdict.succeeded(),
            }
            if let Some(conversation) = self.conversation.take() {
                self.place.remember(conversation, self.seat.served_by());
            }
            let Some(seam) = &mut self.seam else { return Ok(delta) };
            match delta {
                Delta::Text(text) => {
                    let text = seam.push(&text);
                    if seam.found() {
                        let end = Completion::new(FinishReason::Stop);
                        if text.is_empty() {
                            return Ok(Delta::Done(end));
                        }
                        self.done = Some(end);
                    }
                    if !text.is_empty() {
                        return Ok(Delta::Text(text));
                    }
                }
                Delta::Done(completion) => {
                    let rest = seam.finish();
                    if rest.is_empty() {
                        return Ok(Delta::Done(completion));
                    }
                    self.done = Some(completion);
                    return Ok(Delta::Text(rest));
                }
            }
        }
    }
}

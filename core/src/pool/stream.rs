use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::time::Instant;

use super::lease::Lease;
use super::metrics::ModelMetrics;
use crate::answer::{Answer, AnswerEvent, Provenance};
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::request::{Completion, Delta, TokenStream};
use crate::units::ModelName;

/// A model's answer on its way to the caller, with the lease it runs on and the figures of its way.
pub(super) struct Answering {
    model: ModelName,
    metrics: Arc<ModelMetrics>,
    provenance: Provenance,
    /// Until the answer's end or its failure: then the place is free, whether or not the caller drops the stream.
    running: Option<Running>,
    first: Option<Delta>,
    granted: Instant,
    ttft: Option<Duration>,
    last_text: Option<Instant>,
}

struct Running {
    /// Dropped before the lease: the work stops, then the place is free.
    tokens: TokenStream,
    lease: Lease,
}

impl Answering {
    /// An answer whose first delta has come already. `granted` is when the lease was had.
    pub(super) fn new(
        model: ModelName,
        metrics: Arc<ModelMetrics>,
        lease: Lease,
        tokens: TokenStream,
        first: Delta,
        granted: Instant,
    ) -> Self {
        let ttft = matches!(first, Delta::Text(_)).then(|| granted.elapsed());
        if let Some(ttft) = ttft {
            metrics.ttft.record(ttft);
        }
        Self {
            model,
            metrics,
            provenance: lease.provenance().clone(),
            running: Some(Running { tokens, lease }),
            first: Some(first),
            granted,
            ttft,
            last_text: None,
        }
    }

    fn on_delta(&mut self, delta: Delta) -> AnswerEvent {
        match delta {
            Delta::Text(text) => {
                let now = Instant::now();
                if self.ttft.is_none() {
                    self.ttft = Some(now - self.granted);
                    self.metrics.ttft.record(now - self.granted);
                }
                if let Some(last) = self.last_text.replace(now) {
                    self.metrics.inter_token.record(now - last);
                }
                AnswerEvent::Text(text)
            }
            Delta::Done(completion) => {
                self.running = None;
                self.metrics.on_done(&completion);
                AnswerEvent::Done(self.answer(completion))
            }
        }
    }

    fn answer(&self, completion: Completion) -> Answer {
        let speed = |(tokens, time): (u32, Duration)| f64::from(tokens) / time.as_secs_f64();
        let measured =
            completion.completion_tokens.zip(completion.decode_time).filter(|(_, time)| !time.is_zero());
        Answer {
            provenance: self.provenance.clone(),
            finish_reason: completion.finish_reason,
            truncated: completion.truncated,
            prompt_tokens: completion.prompt_tokens,
            cached_tokens: completion.cached_tokens,
            completion_tokens: completion.completion_tokens,
            ttft_ms: self.ttft.map(|ttft| ttft.as_millis() as u64),
            tokens_per_second: measured.map(speed),
            tool_calls: completion.tool_calls,
            logprobs: completion.logprobs,
        }
    }

    fn on_failure(&mut self, mut cause: Failure) -> Error {
        if let Some(running) = self.running.take() {
            cause = running.lease.noted(cause);
        }
        self.metrics.failures.increment(1);
        Error::Request { model: self.model.clone(), served_by: self.provenance.served_by.clone(), cause }
    }
}

impl Stream for Answering {
    type Item = Result<AnswerEvent, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(running) = &mut this.running else { return Poll::Ready(None) };
        let next = match this.first.take() {
            Some(first) => Some(Ok(first)),
            None => match running.tokens.poll_next_unpin(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(next) => next,
            },
        };
        let next =
            next.unwrap_or_else(|| Err(Failure::new(FailureKind::CutOff, "the stream ended before its end")));
        Poll::Ready(Some(match next {
            Ok(delta) => Ok(self.on_delta(delta)),
            Err(cause) => Err(self.on_failure(cause)),
        }))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if self.running.is_some() {
            self.metrics.cancellations.increment(1);
        }
    }
}

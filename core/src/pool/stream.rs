use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use tokio::time::Instant;

use super::metrics::ModelMetrics;
use super::walk::{Attempt, Walk};
use crate::answer::{Answer, AnswerEvent, Handover, Provenance};
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::request::{
    Completion, Delta, FinishReason, GenerateRequest, Prefill, TokenStream, TranscribeRequest, Truncate,
};
use crate::units::ModelName;

/// A model's answer on its way to the caller, with the lease it runs on and the figures of its way.
pub(super) struct Answering {
    model: ModelName,
    metrics: Arc<ModelMetrics>,
    provenance: Provenance,
    state: State,
    /// The way to the next place, where the answer goes on there when this one fails.
    continues: Option<Continues>,
    handovers: Vec<Handover>,
    first: Option<Delta>,
    granted: Instant,
    ttft: Option<Duration>,
    last_text: Option<Instant>,
}

/// Until the answer's end or its failure: then the place is free, whether or not the caller drops the stream.
enum State {
    Running(Running),
    /// Looking for a place to go on at.
    Resuming(BoxFuture<'static, Result<(Started, Continues), Error>>),
    Over,
}

struct Running {
    /// Dropped before the attempt: the work stops, then the place is free.
    tokens: TokenStream,
    attempt: Attempt,
}

/// An answer whose first delta has come.
pub(super) struct Started {
    running: Running,
    first: Delta,
    granted: Instant,
}

/// What it takes to go on with an answer elsewhere.
pub(super) struct Continues {
    request: GenerateRequest,
    walk: Walk,
    said: Prefill,
}

/// What a place is asked for text by.
#[derive(Clone, Debug)]
pub(super) enum Asks {
    Generate(GenerateRequest),
    Transcribe(TranscribeRequest),
}

impl Started {
    /// Puts the request to a place, and waits for what it says first.
    pub(super) async fn at(attempt: Attempt, asks: Asks) -> Result<Self, Failure> {
        let granted = Instant::now();
        let noted = |cause| attempt.lease.noted(cause);
        let tokens = match asks {
            Asks::Generate(mut request) => {
                // A stand-in may have a shorter context than the place that the request was made for. The answer says both.
                if attempt.stands_in {
                    request.truncate = Truncate::Oldest;
                }
                attempt.model.generate(request).await
            }
            Asks::Transcribe(request) => attempt.model.transcribe(request).await,
        };
        let mut tokens = tokens.map_err(noted)?;
        let ended = || Failure::new(FailureKind::CutOff, "the stream ended before its first token");
        let first = tokens.next().await.ok_or_else(ended)?.map_err(noted)?;
        Ok(Self { running: Running { tokens, attempt }, first, granted })
    }
}

impl Continues {
    /// `walk` is the way that led to the place that answers.
    pub(super) fn new(request: GenerateRequest, walk: Walk) -> Self {
        let said = request.prefill.clone().unwrap_or(Prefill { text: String::new(), tokens: 0 });
        Self { request, walk, said }
    }

    async fn elsewhere(mut self) -> Result<(Started, Self), Error> {
        let request = self.request.clone().with_prefill(self.said.clone());
        let started = self.walk.ask(|attempt| Started::at(attempt, Asks::Generate(request.clone()))).await?;
        Ok((started, self))
    }
}

impl Answering {
    pub(super) fn new(
        model: ModelName,
        metrics: Arc<ModelMetrics>,
        started: Started,
        continues: Option<Continues>,
    ) -> Self {
        let Started { running, first, granted } = started;
        let ttft = matches!(first, Delta::Text(_)).then(|| granted.elapsed());
        if let Some(ttft) = ttft {
            metrics.ttft.record(ttft);
        }
        Self {
            model,
            metrics,
            provenance: running.attempt.provenance.clone(),
            state: State::Running(running),
            continues,
            handovers: Vec::new(),
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
                if let Some(continues) = &mut self.continues {
                    continues.said.text.push_str(&text);
                    continues.said.tokens = continues.said.tokens.saturating_add(1);
                }
                AnswerEvent::Text(text)
            }
            Delta::Done(completion) => {
                self.end();
                self.metrics.on_done(&completion);
                AnswerEvent::Done(self.answer(completion))
            }
        }
    }

    fn answer(&mut self, completion: Completion) -> Answer {
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
            handovers: std::mem::take(&mut self.handovers),
        }
    }

    /// The place failed: goes on elsewhere, where that was asked for and somebody else may do better. Gives the end, where all
    /// that was asked for had been said.
    fn on_failure(&mut self, cause: Failure) -> Result<Option<AnswerEvent>, Error> {
        let cause = match std::mem::replace(&mut self.state, State::Over) {
            State::Running(running) => running.attempt.lease.noted(cause),
            State::Resuming(_) | State::Over => cause,
        };
        let by = self.provenance.served_by.clone();
        let Some(mut continues) = self.continues.take().filter(|_| cause.kind.allows_fallback()) else {
            self.end();
            self.metrics.failures.increment(1);
            return Err(Error::Request { model: self.model.clone(), served_by: by, cause });
        };
        if continues.request.sampling.max_tokens.is_some_and(|most| most <= continues.said.tokens) {
            let completion = Completion {
                completion_tokens: Some(continues.said.tokens),
                ..Completion::new(FinishReason::Length)
            };
            return Ok(Some(self.on_delta(Delta::Done(completion))));
        }
        self.handovers.push(Handover {
            at: continues.said.text.chars().count(),
            from: by.clone(),
            // Until somebody goes on.
            to: by.clone(),
            reason: cause.to_string(),
        });
        continues.walk.resume(by, cause)?;
        self.state = State::Resuming(continues.elsewhere().boxed());
        Ok(None)
    }

    fn on_resumed(&mut self, (started, continues): (Started, Continues)) {
        let Started { running, first, .. } = started;
        self.provenance = running.attempt.provenance.clone();
        if let Some(handover) = self.handovers.last_mut() {
            handover.to = self.provenance.served_by.clone();
        }
        self.first = Some(first);
        self.state = State::Running(running);
        self.continues = Some(continues);
    }

    /// Gives everything free.
    fn end(&mut self) {
        self.state = State::Over;
        self.continues = None;
    }
}

impl Stream for Answering {
    type Item = Result<AnswerEvent, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let next = match &mut this.state {
                State::Over => return Poll::Ready(None),
                State::Resuming(resuming) => {
                    match ready!(resuming.poll_unpin(cx)) {
                        Ok(resumed) => this.on_resumed(resumed),
                        Err(error) => {
                            this.end();
                            this.metrics.failures.increment(1);
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                    continue;
                }
                State::Running(running) => match this.first.take() {
                    Some(first) => Some(Ok(first)),
                    None => ready!(running.tokens.poll_next_unpin(cx)),
                },
            };
            let cut_off = || Err(Failure::new(FailureKind::CutOff, "the stream ended before its end"));
            match next.unwrap_or_else(cut_off) {
                Ok(delta) => return Poll::Ready(Some(Ok(this.on_delta(delta)))),
                Err(cause) => {
                    if let Some(end) = this.on_failure(cause).transpose() {
                        return Poll::Ready(Some(end));
                    }
                }
            }
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if !matches!(self.state, State::Over) {
            self.metrics.cancellations.increment(1);
        }
    }
}

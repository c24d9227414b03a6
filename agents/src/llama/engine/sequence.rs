//! One request on its way through the engine: its tokens, how far they are computed, and what has been said so far.

use std::time::Instant;

use llama_cpp_2::token::LlamaToken;
use sarai_core::failure::Failure;
use sarai_core::request::{Alternative, Completion, Delta, FinishReason, GenerateRequest, TokenLogprob};
use tokio::sync::mpsc;

use super::super::constrain::Form;
use super::super::context::SeqId;
use super::super::load::Loaded;
use super::super::prompt::{self, Media, Tokens};
use super::super::sampling::{Chooser, logprobs};
use super::super::tools::Calls;
use super::layout::{Layout, Next};
use super::seam::Seam;
use crate::Error;
use crate::text::{Characters, Stops};

/// A request for text, ready for the engine, and where the text goes. Its reader leaves by dropping the other end.
#[derive(Debug)]
pub(in super::super) struct Sequence {
    /// The prompt, then what has been chosen.
    pub(super) tokens: Vec<LlamaToken>,
    /// What of the prompt are images and audio.
    pub(super) layout: Layout,
    /// How many of them are in the context.
    pub(super) computed: usize,
    /// The sequence of the context that holds them; `None` while it waits.
    pub(super) place: Option<SeqId>,
    /// Where else in the prompt other requests may want to begin, in order.
    pub(super) marks: Vec<usize>,
    /// Tokens of the prompt that were there already when it was first let in.
    pub(super) cached: Option<usize>,
    prompt_length: usize,
    /// Tokens at the prompt's end that are the answer's beginning.
    prefill: usize,
    truncated: bool,
    most: Option<usize>,
    answer: Answer,
    deltas: mpsc::Sender<Result<Delta, Failure>>,
}

/// What has been said.
#[derive(Debug)]
struct Answer {
    chooser: Chooser,
    characters: Characters,
    stops: Stops,
    /// Where the answer was begun elsewhere, until its next token is chosen.
    seam: Option<Seam>,
    /// Where tools may be called.
    calls: Option<Calls>,
    /// How many alternatives are asked for beside each token, and what there is so far.
    logprobs: Option<(usize, Vec<TokenLogprob>)>,
    first: Option<Instant>,
    last: Option<Instant>,
}

/// Whether a sequence goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goes {
    On,
    /// It has ended; its end has been sent.
    Over,
    /// Nobody reads it any more.
    Unread,
}

impl Sequence {
    /// Prepares a request for a context of `n_ctx`. This may take a while, and is not for the engine's thread.
    pub(in super::super) fn prepare(
        loaded: &Loaded,
        request: &GenerateRequest,
        media: &Media,
        n_ctx: u32,
        deltas: mpsc::Sender<Result<Delta, Failure>>,
    ) -> Result<Self, Error> {
        if let Some(what) = request.contradiction() {
            return Err(Error::Contradiction { what });
        }
        let said = request.prefill.as_ref().map_or("", |prefill| prefill.text.as_str());
        let form = request.constraint.as_ref().map(|constraint| Form::after(constraint, said, loaded));
        let form = form.transpose()?;
        // A form knows the text to its last letter.
        let (given, seam) = if form.is_some() { (said, None) } else { Seam::after(said, loaded) };
        let Tokens { tokens, layout, prefill, instructions, truncated } =
            prompt::tokens(loaded, request, given, media, n_ctx)?;
        let sampling = &request.sampling;
        let calls = (!request.tools.is_empty()).then(|| Calls::new(prompt::tool_format(loaded)));
        Ok(Self {
            prompt_length: tokens.len(),
            prefill,
            computed: 0,
            place: None,
            marks: instructions.into_iter().collect(),
            cached: None,
            truncated,
            most: sampling.max_tokens.map(|most| (most as usize).saturating_sub(prefill)),
            answer: Answer {
                chooser: Chooser::new(request, form, loaded.model().vocab().n_tokens(), &tokens)?,
                characters: Characters::default(),
                stops: Stops::after(&sampling.stop, said),
                seam,
                calls,
                logprobs: request.logprobs.map(|n| (n as usize, Vec::new())),
                first: None,
                last: None,
            },
            tokens,
            layout,
            deltas,
        })
    }

    /// The prompt's tokens.
    pub(super) fn prompt(&self) -> &[LlamaToken] {
        &self.tokens[..self.prompt_length]
    }

    /// Tokens that have to be computed before the next one can be chosen.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// What comes next in it.
    pub(super) fn next(&self) -> Next<'_> {
        self.layout.next(self.computed)
    }

    /// Whether images or audio come next in it.
    pub(super) fn looks(&self) -> bool {
        matches!(self.next(), Next::Embedded { .. })
    }

    /// Whether it has begun to answer.
    pub(super) fn writes(&self) -> bool {
        self.tokens.len() > self.prompt_length
    }

    /// Whether its reader has left.
    pub(super) fn unread(&self) -> bool {
        self.deltas.is_closed()
    }

    /// Where the next step of its tokens has to end at the latest: for a mark, or for an image.
    pub(super) fn next_mark(&self) -> usize {
        let mark = self.marks.iter().copied().find(|mark| *mark > self.computed).unwrap_or(usize::MAX);
        match self.next() {
            Next::Tokens(until) => mark.min(until),
            Next::Embedded { .. } => mark,
        }
    }

    /// A request that asks for no tokens is over before anything is computed.
    pub(super) fn wants_none(&self) -> bool {
        self.most == Some(0)
    }

    /// Chooses the next token by the scores that follow on all that is computed, and says its text.
    pub(super) fn choose(&mut self, loaded: &Loaded, scores: &[f32], n_ctx: usize) -> Goes {
        match self.next_token(loaded, scores) {
            Ok(Some(text)) => {
                if self.say(text) == Goes::Unread {
                    return Goes::Unread;
                }
                let written = self.tokens.len() - self.prompt_length;
                if self.answer.stops.found() {
                    self.end(FinishReason::Stop)
                } else if self.most.is_some_and(|most| written >= most) || self.tokens.len() >= n_ctx {
                    self.end(FinishReason::Length)
                } else {
                    Goes::On
                }
            }
            Ok(None) => self.end(FinishReason::Stop),
            Err(error) => self.fail(error.into()),
        }
    }

    /// The text of the next token; `None` where it ends the answer.
    fn next_token(&mut self, loaded: &Loaded, scores: &[f32]) -> Result<Option<String>, Error> {
        let vocab = loaded.model().vocab();
        let answer = &mut self.answer;
        let seam = answer.seam.take();
        let token = match &seam {
            Some(seam) => answer.chooser.choose(&seam.masked(scores))?,
            None => answer.chooser.choose(scores)?,
        };
        if vocab.is_eog(token) {
            return Ok(None);
        }
        let now = Instant::now();
        answer.first.get_or_insert(now);
        answer.last = Some(now);
        answer.chooser.accept(token)?;
        self.tokens.push(token);
        // Markers of calls are special tokens in some vocabularies, which have no text otherwise.
        let special = answer.calls.is_some();
        let piece = |token| vocab.token_to_piece(token, special, None);
        if let Some((alternatives, all)) = &mut answer.logprobs {
            let text = |token| String::from_utf8_lossy(&piece(token)).into_owned();
            let (logprob, top) = logprobs(scores, token, *alternatives);
            let top = top.into_iter().map(|(token, logprob)| Alternative { token: text(token), logprob });
            all.push(TokenLogprob { token: text(token), logprob, top: top.collect() });
        }
        let text = answer.characters.push(&piece(token));
        let text = if seam.is_some() { Seam::rest(text) } else { text };
        Ok(Some(answer.stops.push(&text)))
    }

    /// Says text that is no part of a call.
    fn say(&mut self, text: String) -> Goes {
        match &mut self.answer.calls {
            Some(calls) => {
                let shown = calls.push(&text);
                self.send_text(shown)
            }
            None => self.send_text(text),
        }
    }

    fn send_text(&self, text: String) -> Goes {
        if text.is_empty() { Goes::On } else { self.send(Ok(Delta::Text(text))) }
    }

    /// Says what is still held back, and the end.
    pub(super) fn end(&mut self, reason: FinishReason) -> Goes {
        let rest = self.answer.characters.finish();
        let rest = self.answer.stops.push(&rest) + &self.answer.stops.finish();
        if self.say(rest) == Goes::Unread {
            return Goes::Unread;
        }
        let (tool_calls, text) = self.answer.calls.take().map(|mut calls| calls.finish()).unwrap_or_default();
        if self.send_text(text) == Goes::Unread {
            return Goes::Unread;
        }
        let written = self.tokens.len() - self.prompt_length;
        let count = |n: usize| u32::try_from(n).ok();
        let completion = Completion {
            truncated: self.truncated,
            prompt_tokens: count(self.prompt_length - self.prefill),
            cached_tokens: count(self.cached.unwrap_or(0).min(self.prompt_length - self.prefill)),
            completion_tokens: count(self.prefill + written),
            decode_time: self.decode_time(written).map(|time| self.with_prefill(time, written)),
            finish_reason: if tool_calls.is_empty() { reason } else { FinishReason::ToolCalls },
            tool_calls,
            logprobs: self.answer.logprobs.take().map(|(_, all)| all),
        };
        match self.send(Ok(Delta::Done(completion))) {
            Goes::Unread => Goes::Unread,
            Goes::On | Goes::Over => Goes::Over,
        }
    }

    /// The mean time between two tokens, times their number.
    fn decode_time(&self, written: usize) -> Option<std::time::Duration> {
        let between = self.answer.last?.duration_since(self.answer.first?);
        let (written, intervals) =
            (u32::try_from(written).ok()?, u32::try_from(written.checked_sub(1)?).ok()?);
        if intervals == 0 { None } else { Some(between / intervals * written) }
    }

    /// As if the answer's beginning had been written as fast as the rest.
    fn with_prefill(&self, time: std::time::Duration, written: usize) -> std::time::Duration {
        time.mul_f64((self.prefill + written) as f64 / written.max(1) as f64)
    }

    /// Tells the reader that it failed.
    pub(super) fn fail(&self, failure: Failure) -> Goes {
        match self.send(Err(failure)) {
            Goes::Unread => Goes::Unread,
            Goes::On | Goes::Over => Goes::Over,
        }
    }

    /// The channel has room for all that an answer can have; see `Generator::generate`. So this never waits.
    fn send(&self, delta: Result<Delta, Failure>) -> Goes {
        if self.deltas.try_send(delta).is_ok() { Goes::On } else { Goes::Unread }
    }
}

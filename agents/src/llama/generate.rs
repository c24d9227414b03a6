use std::time::{Duration, Instant};

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::token::LlamaToken;
use sarai_core::failure::Failure;
use sarai_core::request::{Completion, Delta, FinishReason, GenerateRequest, Message, Prompt};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;

use super::estimate::PROMPT_CHUNK;
use super::runtime::active;
use super::text::{Characters, Stops};
use super::{sampling, template};
use crate::Error;

/// A request for text and where the text goes. Its reader leaves by dropping the other end.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: GenerateRequest,
    pub(super) deltas: mpsc::Sender<Result<Delta, Failure>>,
}

/// Why a generation ended early, without a fault.
struct Left;

/// Works a request off. Returns when the answer is complete, has failed, its reader left, or the model is `stopping`;
/// looks at these between any two steps, and while it waits for the reader.
pub(super) fn run(
    model: &LlamaModel,
    context: &mut LlamaContext<'_>,
    job: &Job,
    stopping: &CancellationToken,
) {
    if job.deltas.is_closed() {
        return;
    }
    let mut generation = Generation { model, context, job, stopping };
    let end = match active(|| generation.run()) {
        Ok(Ok(completion)) => Ok(Delta::Done(completion)),
        Ok(Err(Left)) => return,
        Err(error) => Err(error.into()),
    };
    // A reader who left meanwhile does not want to know.
    let _left = generation.send(end);
}

struct Generation<'a, 'm> {
    model: &'a LlamaModel,
    context: &'a mut LlamaContext<'m>,
    job: &'a Job,
    stopping: &'a CancellationToken,
}

impl Generation<'_, '_> {
    fn run(&mut self) -> Result<Result<Completion, Left>, Error> {
        let prompt = self.prompt()?;
        // A text that the vocabulary has nothing for, such as blanks alone.
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let n_ctx = self.context.n_ctx();
        if prompt.len() >= n_ctx as usize {
            return Err(Error::PromptTooLong { tokens: prompt.len(), n_ctx });
        }
        self.context.clear_kv_cache();
        if self.read(&prompt)?.is_err() {
            return Ok(Err(Left));
        }
        self.write(&prompt)
    }

    fn prompt(&self) -> Result<Vec<LlamaToken>, Error> {
        let vocab = self.model.vocab();
        // A vocabulary without such a token gives -1, which llama.cpp must not be asked about.
        let marker = |token: LlamaToken| {
            let text = if token.0 < 0 { None } else { vocab.text(token) };
            text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let bos = marker(vocab.bos());
        let text = match &self.job.request.prompt {
            Prompt::Raw(text) => text.clone(),
            Prompt::Chat(messages) => {
                self.render(messages, &template::Markers { bos: bos.clone(), eos: marker(vocab.eos()) })?
            }
        };
        if text.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        // Many templates begin with the first token that the tokenizer would put there, too.
        let has_bos = !bos.is_empty() && text.starts_with(&bos);
        Ok(vocab.tokenize(text.as_bytes(), !has_bos, true))
    }

    fn render(&self, messages: &[Message], markers: &template::Markers) -> Result<String, Error> {
        let own = self.model.chat_template(None).ok();
        let own = own.as_ref().map(|template| template.as_c_str().to_string_lossy());
        Ok(template::render(own.as_deref(), messages, markers)?)
    }

    /// Computes the prompt, a chunk at a time.
    fn read(&mut self, prompt: &[LlamaToken]) -> Result<Result<(), Left>, Error> {
        let mut batch = LlamaBatch::new(PROMPT_CHUNK as usize, 1);
        for (chunk, tokens) in prompt.chunks(PROMPT_CHUNK.min(self.context.n_batch()) as usize).enumerate() {
            if self.must_end() {
                return Ok(Err(Left));
            }
            let start = chunk * PROMPT_CHUNK.min(self.context.n_batch()) as usize;
            batch.clear();
            for (offset, token) in tokens.iter().enumerate() {
                let at = start + offset;
                batch.add(*token, at as i32, &[0], at + 1 == prompt.len()).map_err(compute)?;
            }
            self.context.decode(&mut batch).map_err(compute)?;
        }
        Ok(Ok(()))
    }

    /// Chooses token after token until something ends the answer.
    fn write(&mut self, prompt: &[LlamaToken]) -> Result<Result<Completion, Left>, Error> {
        let sampling = &self.job.request.sampling;
        let vocab = self.model.vocab();
        let mut sampler = sampling::chain(sampling, vocab.n_tokens());
        // What was said before counts as said.
        sampler.accept_many(prompt);
        let (mut characters, mut stops) = (Characters::default(), Stops::new(&sampling.stop));
        let room = self.context.n_ctx() as usize - prompt.len();
        let most = sampling.max_tokens.map_or(room, |most| room.min(most as usize));
        let mut batch = LlamaBatch::new(1, 1);
        let (mut tokens, mut decoding) = (0, Duration::ZERO);
        let mut finish_reason = FinishReason::Length;
        while tokens < most {
            if self.must_end() {
                return Ok(Err(Left));
            }
            let started = Instant::now();
            let token = sampler.sample(self.context, -1);
            if vocab.is_eog(token) {
                finish_reason = FinishReason::Stop;
                break;
            }
            tokens += 1;
            let text = stops.push(&characters.push(&vocab.token_to_piece(token, false, None)));
            if self.say(text).is_err() {
                return Ok(Err(Left));
            }
            if stops.found() {
                finish_reason = FinishReason::Stop;
                break;
            }
            if tokens < most {
                batch.clear();
                batch.add(token, (prompt.len() + tokens - 1) as i32, &[0], true).map_err(compute)?;
                self.context.decode(&mut batch).map_err(compute)?;
            }
            decoding += started.elapsed();
        }
        let rest = stops.push(&characters.finish()) + &stops.finish();
        if self.say(rest).is_err() {
            return Ok(Err(Left));
        }
        Ok(Ok(Completion {
            finish_reason,
            truncated: false,
            prompt_tokens: u32::try_from(prompt.len()).ok(),
            completion_tokens: u32::try_from(tokens).ok(),
            decode_time: Some(decoding),
        }))
    }

    fn say(&self, text: String) -> Result<(), Left> {
        if text.is_empty() { Ok(()) } else { self.send(Ok(Delta::Text(text))) }
    }

    /// Waits while the reader is slow; fails when it has left or the model stops.
    fn send(&self, delta: Result<Delta, Failure>) -> Result<(), Left> {
        let delta = match self.job.deltas.try_send(delta) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(Left),
            Err(TrySendError::Full(delta)) => delta,
        };
        futures::executor::block_on(async {
            tokio::select! {
                sent = self.job.deltas.send(delta) => sent.map_err(|_| Left),
                () = self.stopping.cancelled() => Err(Left),
            }
        })
    }

    fn must_end(&self) -> bool {
        self.job.deltas.is_closed() || self.stopping.is_cancelled()
    }
}

pub(super) fn compute(error: impl std::fmt::Display) -> Error {
    Error::Compute { reason: error.to_string() }
}

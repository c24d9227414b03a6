use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;

use crate::answer::{Answer, AnswerEvent, AnswerStream, CallOptions, Models, Provenance};
use crate::backend::ServedBy;
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::request::{
    Embeddings, FinishReason, GenerateRequest, LabelScore, Message, Prompt, TranscribeRequest,
};
use crate::units::{Bytes, ModelName};

/// Models that do what their scripts say; a stand-in for a pool. Unknown models are unknown. Clones share everything.
#[derive(Clone, Debug, Default)]
pub struct FakeModels {
    scripts: BTreeMap<String, Script>,
    too_large: BTreeSet<String>,
    asked: Arc<Mutex<Vec<(String, String)>>>,
    prepared: Arc<Mutex<Vec<String>>>,
    running: Arc<()>,
    moved: Arc<AtomicBool>,
}

/// What a model of [`FakeModels`] does.
#[derive(Clone, Debug)]
pub enum Script {
    /// Says these pieces, each after this long.
    Says(Vec<String>, Duration),
    /// Says its prompt's last message again.
    Echoes,
    /// Fails.
    Fails,
    /// Fails so often, each time after this text, in a way that may pass; then says its own, a word at a time.
    Flaky {
        /// How often.
        failures: usize,
        /// What it says before.
        after: String,
        /// What it says in the end.
        says: String,
    },
    /// Embeds a text as the counts of these words in it.
    CountsWords(Vec<String>),
    /// Gives these scores.
    Scores(Vec<LabelScore>),
}

impl FakeModels {
    /// Adds a model.
    #[must_use]
    pub fn with(mut self, model: &str, script: Script) -> Self {
        self.scripts.insert(model.to_owned(), script);
        self
    }

    /// Has a model never fit: it needs 9 GB, and 2 GB can be had.
    #[must_use]
    pub fn too_large(mut self, model: &str) -> Self {
        self.too_large.insert(model.to_owned());
        self
    }

    /// The models that were to be made ready before they are asked, in order.
    #[must_use]
    pub fn prepared(&self) -> Vec<String> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who was asked what, in order: the model, and the last message, with the number of its images and pieces of audio in
    /// front where it has any; the raw prompt; the audio's media type; or the texts in brackets.
    #[must_use]
    pub fn asked(&self) -> Vec<(String, String)> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on other places serve, as after a fallback. Their vectors mean something else by the same numbers.
    pub fn move_on(&self) {
        self.moved.store(true, Ordering::SeqCst);
    }

    fn provenance(&self, model: &ModelName) -> Provenance {
        let place = if self.moved.load(Ordering::SeqCst) { "-elsewhere" } else { "" };
        Provenance {
            served_by: ServedBy::GgufNative(format!("{model}{place}.gguf").into()),
            fallback_reason: None,
            queue_ms: 0,
            load_ms: 0,
            n_ctx: None,
        }
    }

    /// Answers that are neither read to their end nor dropped.
    #[must_use]
    pub fn running(&self) -> usize {
        Arc::strong_count(&self.running) - 1
    }

    fn answer(&self, model: &ModelName, prompt: String) -> Result<AnswerStream, Error> {
        let (pieces, pause, fails) = match self.script(model, prompt.clone())? {
            Script::Says(pieces, pause) => (pieces, pause, false),
            Script::Flaky { failures, after, says } => {
                let times = self.asked().iter().filter(|(asked, _)| asked == model.as_str()).count();
                let (text, fails) = if times <= failures { (after, true) } else { (says, false) };
                (text.split_inclusive(' ').map(str::to_owned).collect(), Duration::from_millis(1), fails)
            }
            _ => (vec![prompt], Duration::ZERO, false),
        };
        let answer = Answer {
            provenance: self.provenance(model),
            finish_reason: FinishReason::Stop,
            truncated: false,
            prompt_tokens: None,
            cached_tokens: None,
            completion_tokens: Some(pieces.len() as u32),
            ttft_ms: Some(0),
            tokens_per_second: None,
            tool_calls: Vec::new(),
            logprobs: None,
            handovers: Vec::new(),
        };
        let failure = Error::Request {
            model: model.clone(),
            served_by: answer.provenance.served_by.clone(),
            cause: Failure::new(FailureKind::CutOff, "scripted"),
        };
        let running = Arc::clone(&self.running);
        let text = futures::stream::iter(pieces).then(move |piece| {
            let running = Arc::clone(&running);
            async move {
                tokio::time::sleep(pause).await;
                drop(running);
                Ok(AnswerEvent::Text(piece))
            }
        });
        let running = Arc::clone(&self.running);
        let done = futures::stream::once(async move {
            drop(running);
            if fails { Err(failure) } else { Ok(AnswerEvent::Done(answer)) }
        });
        Ok(text.chain(done).boxed())
    }

    fn script(&self, model: &ModelName, prompt: String) -> Result<Script, Error> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push((model.to_string(), prompt));
        let unknown = || Error::UnknownModel { model: model.to_string(), nearest: None };
        match self.scripts.get(model.as_str()).cloned().ok_or_else(unknown)? {
            Script::Fails => {
                let cause = Failure::new(FailureKind::Engine, "scripted");
                Err(Error::Request {
                    model: model.clone(),
                    served_by: self.provenance(model).served_by,
                    cause,
                })
            }
            script => Ok(script),
        }
    }
}

#[async_trait]
impl Models for FakeModels {
    async fn generate(
        &self,
        model: &ModelName,
        request: GenerateRequest,
        _options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        let shown = |message: &Message| match (message.images.len(), message.audio.len()) {
            (0, 0) => message.content.clone(),
            (images, audio) => format!("[{images} images, {audio} audio] {}", message.content),
        };
        let prompt = match request.prompt {
            Prompt::Chat(messages) => messages.last().map(shown).unwrap_or_default(),
            Prompt::Raw(text) => text,
        };
        self.answer(model, prompt)
    }

    async fn transcribe(
        &self,
        model: &ModelName,
        request: TranscribeRequest,
        _options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        self.answer(model, request.audio.media_type().to_owned())
    }

    async fn can_fit(&self, model: &ModelName) -> Result<(), Error> {
        if self.too_large.contains(model.as_str()) {
            return Err(Error::OverBudget {
                model: model.clone(),
                asked: Bytes::from_gb(9.0),
                left: Bytes::from_gb(2.0),
                budget: Bytes::from_gb(2.0),
                holders: Vec::new(),
            });
        }
        Ok(())
    }

    async fn prepare(&self, model: &ModelName) {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).push(model.to_string());
    }

    async fn embed(
        &self,
        model: &ModelName,
        texts: Vec<String>,
        _options: CallOptions,
    ) -> Result<(Embeddings, Provenance), Error> {
        let script = self.script(model, format!("{texts:?}"))?;
        let Script::CountsWords(words) = script else {
            return Err(Error::Unsupported {
                model: model.clone(),
                capability: crate::request::Capability::Embed,
            });
        };
        let mut vectors: Vec<Vec<f32>> = texts.iter().map(|text| counted(text, &words)).collect();
        if self.moved.load(Ordering::SeqCst) {
            vectors.iter_mut().for_each(|vector| vector.reverse());
        }
        Ok((Embeddings { vectors, prompt_tokens: None }, self.provenance(model)))
    }

    async fn classify(
        &self,
        model: &ModelName,
        text: String,
        _options: CallOptions,
    ) -> Result<(Vec<LabelScore>, Provenance), Error> {
        let Script::Scores(scores) = self.script(model, text)? else {
            return Err(Error::Unsupported {
                model: model.clone(),
                capability: crate::request::Capability::Classify,
            });
        };
        Ok((scores, self.provenance(model)))
    }
}

/// A vector of length 1, or of zeros where no word occurs.
fn counted(text: &str, words: &[String]) -> Vec<f32> {
    let counts: Vec<f32> = words.iter().map(|word| text.matches(word.as_str()).count() as f32).collect();
    let length = counts.iter().map(|n| n * n).sum::<f32>().sqrt();
    counts.iter().map(|n| if length > 0.0 { n / length } else { 0.0 }).collect()
}

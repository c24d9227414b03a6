use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use reqwest::multipart::{Form, Part};
use sarai_core::backend::ServedBy;
use sarai_core::config::HostConfig;
use sarai_core::request::{
    Capabilities, Capability, Completion, Constraint, Delta, Embeddings, FinishReason, GenerateRequest,
    Prompt, TranscribeRequest,
};
use sarai_core::units::HostName;
use tokio::sync::Semaphore;

use super::stream;
use super::wire::{
    EmbedAnswer, EmbedRequest, Models, TextRequest, Transcript, error_text, messages, schema_format,
};
use crate::Error;
use crate::remote::{Deltas, HostApi, Http, Lines};

const TRANSCRIPTIONS: &str = "v1/audio/transcriptions";
/// The bytes of a second of speech, as they are at 128 kbit/s; a WAV file has twice as many.
const SECOND_OF_SPEECH: usize = 16_000;

/// A host that speaks OpenAI's API. One per host: it counts the requests.
#[derive(Debug)]
pub struct Client {
    http: Http,
    places: Arc<Semaphore>,
    /// Whether it has answered before: until then it may have to load its model first.
    answered: AtomicBool,
}

impl Client {
    /// A client for a host. Nothing is sent yet.
    ///
    /// # Errors
    /// The URL is not one of `http://` or `https://`, or the system's certificates cannot be read.
    pub fn new(host: HostName, config: &HostConfig) -> Result<Self, Error> {
        let places = Arc::new(Semaphore::new(config.parallel.max(1)));
        Ok(Self { http: Http::new(host, config, error_text)?, places, answered: AtomicBool::new(false) })
    }

    fn deadlines(&self) -> crate::remote::Deadlines {
        self.http.deadlines(self.answered.load(Ordering::Relaxed))
    }

    /// What the protocol has no word for.
    fn check(&self, request: &GenerateRequest) -> Result<(), Error> {
        let empty = match &request.prompt {
            Prompt::Chat(messages) => messages.is_empty(),
            Prompt::Raw(text) => text.is_empty(),
        };
        if empty {
            return Err(Error::EmptyPrompt);
        }
        let what = request.contradiction().or_else(|| {
            let prefilled = request.prefill.is_some();
            [
                (
                    !request.logit_bias.is_empty(),
                    "a host's tokens have no numbers here: it takes no logit biases",
                ),
                (
                    matches!(request.constraint, Some(Constraint::Grammar(_))),
                    "OpenAI's API knows JSON schemas, and no grammars",
                ),
                (
                    prefilled && request.constraint.is_some(),
                    "a host cannot go on with an answer that has to have a form",
                ),
                (
                    prefilled && matches!(request.prompt, Prompt::Chat(_)) && !self.http.config().continues,
                    "the host is not known to go on with an answer: see `continues:` of its configuration",
                ),
            ]
            .into_iter()
            .find_map(|(wrong, what)| wrong.then_some(what))
        });
        what.map_or(Ok(()), |what| Err(Error::Contradiction { what }))
    }
}

#[async_trait]
impl HostApi for Client {
    fn name(&self) -> &HostName {
        self.http.host()
    }

    fn served_by(&self) -> ServedBy {
        ServedBy::OpenaiHttp(self.http.host().clone())
    }

    fn places(&self) -> &Arc<Semaphore> {
        &self.places
    }

    fn parallel(&self) -> usize {
        self.http.config().parallel.max(1)
    }

    fn resident(&self, _model: &str) -> Option<bool> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        use Capability::{Generate, Hear, See, Transcribe};
        Capabilities::of(&[Generate, See, Hear, Transcribe])
    }

    /// By `/v1/audio/transcriptions`, as OpenAI, speaches, vLLM and LocalAI have it; whisper.cpp's server, too, when it is
    /// started with `--inference-path /v1/audio/transcriptions`. The text comes in one piece, when all the work is done: the
    /// first token's deadline is later by the time that it takes to speak what is sent.
    async fn transcribe(&self, model: &str, request: &TranscribeRequest) -> Result<Deltas, Error> {
        let TranscribeRequest { audio, language, prompt, sampling } = request;
        let spoken = Duration::from_secs((audio.bytes().len() / SECOND_OF_SPEECH) as u64);
        let deadlines = self.deadlines().with_more_for_first(spoken);
        let form = || {
            let name = format!("audio.{}", audio.extension());
            let bytes = Bytes::from_owner(audio.clone());
            let length = bytes.len() as u64;
            let file = || Part::stream_with_length(bytes.clone(), length).file_name(name.clone());
            // The media types are our own: none of them is malformed.
            let file = file().mime_str(audio.media_type()).unwrap_or_else(|_| file());
            let form = Form::new().part("file", file).text("model", model.to_owned());
            let form = form.text("response_format", "json");
            let temperature = sampling.temperature.map(|temperature| temperature.to_string());
            [("language", language), ("prompt", prompt), ("temperature", &temperature)]
                .into_iter()
                .filter_map(|(name, value)| Some((name, value.clone()?)))
                .fold(form, |form, (name, value)| form.text(name, value))
        };
        let response = self.http.post_form(TRANSCRIPTIONS, form, &deadlines).await.map_err(not_there)?;
        let Transcript { text } = self.http.body(response, &deadlines).await?;
        self.answered.store(true, Ordering::Relaxed);
        let text = text.trim().to_owned();
        let text = (!text.is_empty()).then_some(Ok(Delta::Text(text)));
        let end = Ok(Delta::Done(Completion::new(FinishReason::Stop)));
        Ok(futures::stream::iter(text.into_iter().chain([end])).boxed())
    }

    async fn generate(
        &self,
        model: &str,
        _n_ctx: Option<u32>,
        request: &GenerateRequest,
    ) -> Result<Deltas, Error> {
        self.check(request)?;
        let said = request.prefill.as_ref().map_or("", |prefill| prefill.text.as_str());
        let mut body = TextRequest::sampling(model, request);
        if let Some(Constraint::JsonSchema(schema)) = &request.constraint {
            body.response_format = Some(schema_format(schema));
        }
        let path = match &request.prompt {
            Prompt::Chat(conversation) => {
                body.messages = Some(messages(conversation, said));
                if !said.is_empty() {
                    (body.continue_final_message, body.add_generation_prompt) = (Some(true), Some(false));
                }
                "v1/chat/completions"
            }
            Prompt::Raw(text) => {
                body.prompt = Some(format!("{text}{said}"));
                "v1/completions"
            }
        };
        let deadlines = self.deadlines();
        let response = self.http.post(path, &body, &deadlines).await?;
        self.answered.store(true, Ordering::Relaxed);
        Ok(stream::tokens(Lines::new(self.http.host().clone(), response, deadlines)))
    }

    async fn embed(&self, model: &str, _n_ctx: Option<u32>, texts: &[String]) -> Result<Embeddings, Error> {
        let deadlines = self.deadlines();
        let body = EmbedRequest { model, input: texts, encoding_format: "float" };
        let response = self.http.post("v1/embeddings", &body, &deadlines).await?;
        let mut answer: EmbedAnswer = self.http.body(response, &deadlines).await?;
        self.answered.store(true, Ordering::Relaxed);
        if answer.data.len() != texts.len() {
            let what = format!("{} vectors for {} texts", answer.data.len(), texts.len());
            return Err(self.http.unexpected(what));
        }
        // Each says which text it is of; without that they come in the texts' order.
        answer.data.sort_by_key(|embedded| embedded.index.unwrap_or(0));
        let prompt_tokens = answer.usage.and_then(|usage| usage.prompt_tokens);
        let vectors = answer.data.into_iter().map(|embedded| embedded.embedding).collect();
        Ok(Embeddings::normalised(vectors, prompt_tokens))
    }

    async fn unload(&self, _model: &str) -> Result<bool, Error> {
        Ok(false)
    }

    async fn has(&self) -> Result<Vec<String>, Error> {
        let answer: Models = self.http.quick("v1/models").await?;
        Ok(answer.data.into_iter().map(|model| model.id).collect())
    }

    fn how_to_get(&self, _model: &str) -> String {
        "set host_model: to one that the host has".to_owned()
    }
}

/// A host that does not transcribe answers as one without the model does. Either way another one may have both.
fn not_there(error: Error) -> Error {
    match error {
        Error::Status { host, status: status @ (404 | 405 | 501), message, retry_after } => {
            let message = format!("{message}; it lacks the model, or /{TRANSCRIPTIONS}");
            Error::Status { host, status, message, retry_after }
        }
        other => other,
    }
}

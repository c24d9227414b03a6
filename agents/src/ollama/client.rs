use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use sarai_core::backend::ServedBy;
use sarai_core::config::HostConfig;
use sarai_core::request::{
    Capabilities, Capability, Constraint, Embeddings, GenerateRequest, Prompt, Truncate,
};
use sarai_core::units::{Bytes, HostName};
use serde::de::IgnoredAny;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::residency::Residency;
use super::room::{Coming, Room, Running};
use super::stream;
use super::wire::{
    EmbedAnswer, EmbedRequest, ErrorBody, HostModel, Options, Processes, ResidencyRequest, Tags, TextRequest,
    Version, WireMessage,
};
use crate::Error;
use crate::error::Stage;
use crate::remote::{Deadlines, Deltas, HostApi, Http, Lines};

/// How long an unload may take until the host confirms it. Ollama itself waits up to 5 s for memory to come back.
const UNLOAD: Duration = Duration::from_secs(15);
const UNLOAD_POLL: Duration = Duration::from_millis(100);

/// A remote Ollama, over its native HTTP API. One per host: it counts the requests.
#[derive(Debug)]
pub struct Client {
    http: Http,
    places: Arc<Semaphore>,
    residency: Residency,
    room: Room,
}

impl Client {
    /// A client for a host. Nothing is sent yet.
    ///
    /// # Errors
    /// The URL is not one of `http://` or `https://`, or the system's certificates cannot be read.
    pub fn new(host: HostName, config: &HostConfig) -> Result<Self, Error> {
        let error_text = |body: &[u8]| Some(serde_json::from_slice::<ErrorBody>(body).ok()?.error);
        let places = Arc::new(Semaphore::new(config.parallel.max(1)));
        let http = Http::new(host, config, error_text)?;
        Ok(Self { http, places, residency: Residency::default(), room: Room::new(config.max_ram) })
    }

    /// The host's name.
    #[must_use]
    pub fn host(&self) -> &HostName {
        self.http.host()
    }

    /// Whether the host is this machine.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.http.is_loopback()
    }

    /// The host's version. Says that it lives, not that it can load a model.
    ///
    /// # Errors
    /// The host cannot be reached or is no Ollama.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn version(&self) -> Result<String, Error> {
        let answer: Version = self.http.quick("api/version").await?;
        Ok(answer.version)
    }

    /// The models that the host holds in memory.
    ///
    /// # Errors
    /// The host cannot be reached or is no Ollama.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ps(&self) -> Result<Vec<HostModel>, Error> {
        let answer: Processes = self.http.quick("api/ps").await?;
        let names = answer.models.iter().map(|model| with_tag(&model.name));
        self.residency.listed(names, self.http.config().keep_alive);
        Ok(answer.models)
    }

    /// Has the host load a model and keep it for its keep-alive; returns when it is loaded.
    ///
    /// # Errors
    /// The host cannot be reached, does not have the model, or cannot load it.
    ///
    /// # Cancel safety
    /// Cancel safe: the host gives the load up.
    pub async fn preload(&self, model: &str, n_ctx: Option<u32>) -> Result<(), Error> {
        let deadlines = self.http.deadlines(false);
        let body = ResidencyRequest {
            model,
            keep_alive: self.keep_alive(),
            stream: false,
            options: Options::context(n_ctx),
        };
        let _admitted = self.admit(model, &deadlines).await?;
        let response = self.http.post("api/generate", &body, &deadlines).await?;
        self.http.body::<IgnoredAny>(response, &deadlines).await?;
        self.used(model);
        Ok(())
    }

    /// Has the host free a model's memory, and waits until it has. Its file stays. A model that is not loaded is fine.
    ///
    /// # Errors
    /// The host cannot be reached, does not know the model, or still holds it after 15 s.
    ///
    /// # Cancel safety
    /// Cancel safe: the host may or may not have got the request.
    pub async fn unload(&self, model: &str) -> Result<(), Error> {
        let deadlines = Deadlines::within(UNLOAD);
        let body = ResidencyRequest { model, keep_alive: 0, stream: false, options: Options::context(None) };
        let response = self.http.post("api/generate", &body, &deadlines).await?;
        self.http.body::<IgnoredAny>(response, &deadlines).await?;
        let wanted = with_tag(model);
        loop {
            match self.ps().await {
                Ok(models) if models.iter().all(|loaded| with_tag(&loaded.name) != wanted) => return Ok(()),
                // The list may stand still for as long as the host waits for the memory to come back.
                Ok(_) | Err(Error::Deadline { .. }) => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadlines.total {
                return Err(Error::Deadline {
                    host: self.host().clone(),
                    stage: Stage::Unload,
                    limit: UNLOAD,
                });
            }
            tokio::time::sleep(UNLOAD_POLL).await;
        }
    }

    /// What the host may hold, where it has a limit.
    #[must_use]
    pub fn limit(&self) -> Option<Bytes> {
        self.room.limit()
    }

    /// These models, by their names there, are not unloaded to keep the host below its limit.
    pub fn keep(&self, models: impl IntoIterator<Item = String>) {
        self.room.keep(models);
    }

    /// Looks at what the host holds, and has it unload the least recently used of its idle models until it is below its
    /// limit, each confirmed. Returns what it holds then.
    ///
    /// # Errors
    /// The host cannot be reached or does not confirm an unload, or all that is left is in use or kept
    /// ([`Error::HostFull`]).
    ///
    /// # Cancel safety
    /// Cancel safe: an unload that has begun goes on.
    pub async fn tidy(&self) -> Result<Bytes, Error> {
        self.room.tidy(self).await
    }

    /// The size of a model's file, by the name that the host lists it under.
    pub(super) async fn size_on_disk(&self, name: &str) -> Result<Option<Bytes>, Error> {
        let tags: Tags = self.http.quick("api/tags").await?;
        Ok(tags.models.into_iter().find(|tag| with_tag(&tag.name) == name).map(|tag| Bytes(tag.size)))
    }

    /// Makes room on a host with a limit, unless it surely holds the model.
    async fn admit(&self, model: &str, deadlines: &Deadlines) -> Result<(Running, Option<Coming>), Error> {
        let running = self.room.running(model);
        if self.room.limit().is_none() || self.resident(model) == Some(true) {
            return Ok((running, None));
        }
        let room = tokio::time::timeout_at(deadlines.until_first(), self.room.before_load(self, model));
        // That the host is slow with its list says nothing of the model.
        let slow = |error| match error {
            Error::Deadline { host, limit, .. } => Error::Deadline { host, stage: Stage::Queue, limit },
            other => other,
        };
        let coming = room.await.map_err(|_| self.http.late(Stage::Queue, deadlines))?.map_err(slow)?;
        Ok((running, coming))
    }

    /// In whole seconds. Rounded up: zero would mean to unload the model after the request.
    fn keep_alive(&self) -> u64 {
        let keep_alive = self.http.config().keep_alive;
        u64::try_from(keep_alive.as_millis().div_ceil(1000)).unwrap_or(u64::MAX)
    }

    fn used(&self, model: &str) {
        self.residency.used(with_tag(model), self.http.config().keep_alive);
    }

    fn deadlines(&self, model: &str) -> Deadlines {
        self.http.deadlines(self.resident(model) == Some(true))
    }
}

#[async_trait]
impl HostApi for Client {
    fn name(&self) -> &HostName {
        self.host()
    }

    fn served_by(&self) -> ServedBy {
        ServedBy::OllamaHttp(self.host().clone())
    }

    fn places(&self) -> &Arc<Semaphore> {
        &self.places
    }

    fn parallel(&self) -> usize {
        self.http.config().parallel.max(1)
    }

    fn resident(&self, model: &str) -> Option<bool> {
        self.residency.of(&with_tag(model))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::of(&[Capability::Generate, Capability::See])
    }

    async fn generate(
        &self,
        model: &str,
        n_ctx: Option<u32>,
        request: &GenerateRequest,
    ) -> Result<Deltas, Error> {
        check(request)?;
        if request.has_audio() {
            return Err(Error::HostCannot { host: self.name().clone(), what: Capability::Hear });
        }
        let format = match &request.constraint {
            Some(Constraint::JsonSchema(schema)) => Some(schema),
            Some(Constraint::Grammar(_)) => {
                return Err(Error::Contradiction { what: "an Ollama knows JSON schemas, and no grammars" });
            }
            None => None,
        };
        let deadlines = self.deadlines(model);
        let said = request.prefill.as_ref().map_or("", |prefill| prefill.text.as_str());
        let raw: String;
        let (path, messages, prompt) = match &request.prompt {
            Prompt::Chat(messages) => {
                let said = (!said.is_empty()).then(|| WireMessage::said(said));
                ("api/chat", Some(messages.iter().map(Into::into).chain(said).collect()), None)
            }
            Prompt::Raw(text) => {
                raw = format!("{text}{said}");
                ("api/generate", None, Some(raw.as_str()))
            }
        };
        let mut body = TextRequest {
            model,
            messages,
            tools: request.tools.iter().map(Into::into).collect(),
            format,
            prompt,
            raw: prompt.map(|_| true),
            stream: true,
            think: Some(false),
            truncate: request.truncate == Truncate::Oldest,
            shift: false,
            keep_alive: self.keep_alive(),
            options: Options::sampling(n_ctx, request),
        };
        let (running, coming) = self.admit(model, &deadlines).await?;
        let response = match self.http.post(path, &body, &deadlines).await {
            Err(Error::Status { status: 400, message, .. }) if message.contains("thinking") => {
                body.think = None;
                self.http.post(path, &body, &deadlines).await?
            }
            other => other?,
        };
        // It sends nothing before its first token.
        self.used(model);
        drop(coming);
        let tokens = stream::tokens(Lines::new(self.host().clone(), response, deadlines));
        Ok(tokens.inspect(move |_| _ = &running).boxed())
    }

    async fn embed(&self, model: &str, n_ctx: Option<u32>, texts: &[String]) -> Result<Embeddings, Error> {
        let deadlines = self.deadlines(model);
        let body = EmbedRequest {
            model,
            input: texts,
            truncate: false,
            keep_alive: self.keep_alive(),
            options: Options::context(n_ctx),
        };
        let _admitted = self.admit(model, &deadlines).await?;
        let response = self.http.post("api/embed", &body, &deadlines).await.map_err(crashed)?;
        let answer: EmbedAnswer = self.http.body(response, &deadlines).await?;
        if answer.embeddings.len() != texts.len() {
            let what = format!("{} vectors for {} texts", answer.embeddings.len(), texts.len());
            return Err(self.http.unexpected(what));
        }
        self.used(model);
        Ok(Embeddings::normalised(answer.embeddings, answer.prompt_eval_count))
    }

    async fn unload(&self, model: &str) -> Result<bool, Error> {
        Self::unload(self, model).await?;
        self.residency.gone(&with_tag(model));
        Ok(true)
    }

    async fn has(&self) -> Result<Vec<String>, Error> {
        let answer: Tags = self.http.quick("api/tags").await?;
        Ok(answer.models.into_iter().map(|model| model.name).collect())
    }

    fn how_to_get(&self, model: &str) -> String {
        format!("`ollama pull {model}` on that host gets it")
    }
}

/// What an Ollama would take for something else, or leave out without a word.
fn check(request: &GenerateRequest) -> Result<(), Error> {
    // To the host, a request without a prompt is one to load the model.
    let empty = match &request.prompt {
        Prompt::Chat(messages) => messages.is_empty(),
        Prompt::Raw(text) => text.is_empty(),
    };
    if empty {
        return Err(Error::EmptyPrompt);
    }
    if let Some(what) = request.contradiction() {
        return Err(Error::Contradiction { what });
    }
    if !request.logit_bias.is_empty() {
        return Err(Error::Contradiction { what: "an Ollama takes no logit biases" });
    }
    if request.prefill.is_some() && request.constraint.is_some() {
        let what = "an Ollama cannot go on with an answer that has to have a form";
        return Err(Error::Contradiction { what });
    }
    Ok(())
}

/// The name as the host lists it: with the tag that it takes where none is said, without the suffix that asks for a
/// local model. A colon before the last slash is a registry's port.
pub(super) fn with_tag(model: &str) -> String {
    let model = model.strip_suffix(":local").unwrap_or(model);
    let name = model.rsplit('/').next().unwrap_or(model);
    if name.contains(':') { model.to_owned() } else { format!("{model}:latest") }
}

/// `/api/embed` answers 400 also where its runner has failed.
fn crashed(error: Error) -> Error {
    match error {
        Error::Status { host, status: 400, message, .. }
            if ["terminated", "unexpectedly", "out of memory"].iter().any(|sign| message.contains(sign)) =>
        {
            Error::HostReported { host, message }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_as_the_host_lists_them() {
        for (given, listed) in [
            ("solar", "solar:latest"),
            ("solar:10.7b", "solar:10.7b"),
            ("solar:10.7b:local", "solar:10.7b"),
            ("localhost:5000/me/solar", "localhost:5000/me/solar:latest"),
        ] {
            assert_eq!(with_tag(given), listed);
        }
    }
}

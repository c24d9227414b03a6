use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use sarai_core::config::HostConfig;
use sarai_core::request::{Constraint, Embeddings, GenerateRequest, Prompt, TokenStream, Truncate};
use sarai_core::units::HostName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::stream::{self, Deadlines};
use super::wire::{
    EmbedAnswer, EmbedRequest, ErrorBody, HostModel, Options, Processes, ResidencyRequest, TextRequest,
    Version,
};
use crate::Error;
use crate::error::Stage;

/// The most of an error's body that is read.
const LONGEST_ERROR: usize = 64 << 10;
/// The most of an answer that is no stream.
const LONGEST_ANSWER: usize = 256 << 20;
/// How long an error's body is waited for.
const EXPLANATION: Duration = Duration::from_secs(1);
/// How long small questions (ps, version) may take.
const QUICK: Duration = Duration::from_secs(5);
/// How long an unload may take until the host confirms it. Ollama itself waits up to 5 s for memory to come back.
const UNLOAD: Duration = Duration::from_secs(15);
const UNLOAD_POLL: Duration = Duration::from_millis(100);

/// A remote Ollama, over its native HTTP API. One per host: it keeps the connections and counts the requests.
#[derive(Debug)]
pub struct Client {
    host: HostName,
    base: Url,
    config: HostConfig,
    http: reqwest::Client,
    /// Ollama queues without bound, so the bound is here.
    running: Arc<Semaphore>,
}

impl Client {
    /// A client for a host. Nothing is sent yet.
    ///
    /// # Errors
    /// The URL is not one of `http://` or `https://`, or the system's certificates cannot be read.
    pub fn new(host: HostName, config: &HostConfig) -> Result<Self, Error> {
        let bad = |reason: String| Error::BadUrl { host: host.clone(), reason };
        let base = Url::parse(&config.url).map_err(|error| bad(error.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
            return Err(bad("it must be http:// or https:// and name a host".to_owned()));
        }
        // The first caller's provider is as good as ours.
        let _there_already = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .connect_timeout(config.connect_timeout)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("sarai/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .build()
            .map_err(|source| Error::HttpClient { host: host.clone(), source })?;
        let running = Arc::new(Semaphore::new(config.parallel.max(1)));
        Ok(Self { host, base, config: config.clone(), http, running })
    }

    /// The host's name.
    #[must_use]
    pub fn host(&self) -> &HostName {
        &self.host
    }

    /// Requests that may run on the host at once.
    #[must_use]
    pub fn parallel(&self) -> usize {
        self.config.parallel
    }

    /// The host's version. Says that it lives, not that it can load a model.
    ///
    /// # Errors
    /// The host cannot be reached or is no Ollama.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn version(&self) -> Result<String, Error> {
        let answer: Version = self.quick("api/version").await?;
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
        let answer: Processes = self.quick("api/ps").await?;
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
        let deadlines = self.deadlines();
        let _running = self.turn(&deadlines).await?;
        let body = ResidencyRequest {
            model,
            keep_alive: self.keep_alive(),
            stream: false,
            options: Options::context(n_ctx),
        };
        let response = self.post("api/generate", &body, &deadlines).await?;
        self.body::<serde::de::IgnoredAny>(response, &deadlines).await.map(drop)
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
        let response = self.post("api/generate", &body, &deadlines).await?;
        self.body::<serde::de::IgnoredAny>(response, &deadlines).await?;
        let wanted = with_tag(model);
        loop {
            match self.ps().await {
                Ok(models) if models.iter().all(|loaded| with_tag(&loaded.name) != wanted) => return Ok(()),
                // The list may stand still for as long as the host waits for the memory to come back.
                Ok(_) | Err(Error::Deadline { .. }) => {}
                Err(error) => return Err(error),
            }
            if Instant::now() >= deadlines.total {
                return Err(Error::Deadline { host: self.host.clone(), stage: Stage::Unload, limit: UNLOAD });
            }
            tokio::time::sleep(UNLOAD_POLL).await;
        }
    }

    /// Continues a prompt: a conversation through the model's template on the host, or a text as it is.
    ///
    /// # Errors
    /// Anything that goes wrong before the host begins to answer; later failures come in the stream.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future or the stream closes the connection, which is how the host is told.
    pub async fn generate(
        &self,
        model: &str,
        n_ctx: Option<u32>,
        request: &GenerateRequest,
    ) -> Result<TokenStream, Error> {
        // To the host, a request without a prompt is one to load the model.
        if matches!(&request.prompt, Prompt::Chat(messages) if messages.is_empty())
            || matches!(&request.prompt, Prompt::Raw(text) if text.is_empty())
        {
            return Err(Error::EmptyPrompt);
        }
        if let Some(what) = request.contradiction() {
            return Err(Error::Contradiction { what });
        }
        if !request.logit_bias.is_empty() {
            return Err(Error::Contradiction { what: "an Ollama takes no logit biases" });
        }
        let format = match &request.constraint {
            Some(Constraint::JsonSchema(schema)) => Some(schema),
            Some(Constraint::Grammar(_)) => {
                return Err(Error::Contradiction { what: "an Ollama knows JSON schemas, and no grammars" });
            }
            None => None,
        };
        let deadlines = self.deadlines();
        let running = self.turn(&deadlines).await?;
        let (path, messages, prompt) = match &request.prompt {
            Prompt::Chat(messages) => ("api/chat", Some(messages.iter().map(Into::into).collect()), None),
            Prompt::Raw(text) => ("api/generate", None, Some(text.as_str())),
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
            options: Options::sampling(n_ctx, &request.sampling),
        };
        let response = match self.post(path, &body, &deadlines).await {
            Err(Error::Status { status: 400, message, .. }) if message.contains("thinking") => {
                body.think = None;
                self.post(path, &body, &deadlines).await?
            }
            other => other?,
        };
        Ok(stream::tokens(self.host.clone(), response, deadlines, running))
    }

    /// Embeds texts; each vector is brought to length 1.
    ///
    /// # Errors
    /// The host cannot be reached, does not have the model, refuses a text, or answers with another number of vectors.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn embed(
        &self,
        model: &str,
        n_ctx: Option<u32>,
        texts: &[String],
    ) -> Result<Embeddings, Error> {
        let deadlines = self.deadlines();
        let _running = self.turn(&deadlines).await?;
        let body = EmbedRequest {
            model,
            input: texts,
            truncate: false,
            keep_alive: self.keep_alive(),
            options: Options::context(n_ctx),
        };
        let response = self.post("api/embed", &body, &deadlines).await.map_err(crashed)?;
        let answer: EmbedAnswer = self.body(response, &deadlines).await?;
        if answer.embeddings.len() != texts.len() {
            let what = format!("{} vectors for {} texts", answer.embeddings.len(), texts.len());
            return Err(self.not_ollama(what));
        }
        Ok(Embeddings::normalised(answer.embeddings, answer.prompt_eval_count))
    }

    /// In whole seconds. Rounded up: zero would mean to unload the model after the request.
    fn keep_alive(&self) -> u64 {
        u64::try_from(self.config.keep_alive.as_millis().div_ceil(1000)).unwrap_or(u64::MAX)
    }

    fn deadlines(&self) -> Deadlines {
        let now = Instant::now();
        Deadlines {
            first: now + self.config.first_token_timeout,
            stall: self.config.stall_timeout,
            total: now + self.config.total_timeout,
            limits: (self.config.first_token_timeout, self.config.total_timeout),
        }
    }

    /// Waits for one of the host's places; that time counts as time to the first token.
    async fn turn(&self, deadlines: &Deadlines) -> Result<OwnedSemaphorePermit, Error> {
        let place = Arc::clone(&self.running).acquire_owned();
        match tokio::time::timeout_at(deadlines.until_first(), place).await {
            Ok(Ok(permit)) => Ok(permit),
            // Never closed: only the deadline is left.
            Ok(Err(_)) | Err(_) => Err(self.late(Stage::Queue, deadlines)),
        }
    }

    async fn quick<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let deadlines = Deadlines::within(QUICK);
        let response = self.send(|| self.request(Method::GET, path), &deadlines).await?;
        self.body(response, &deadlines).await
    }

    async fn post(
        &self,
        path: &str,
        body: &impl Serialize,
        deadlines: &Deadlines,
    ) -> Result<Response, Error> {
        self.send(|| self.request(Method::POST, path).json(body), deadlines).await
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let mut url = self.base.clone();
        url.set_path(&format!("{}/{path}", self.base.path().trim_end_matches('/')));
        self.http.request(method, url)
    }

    /// Sends until the host has begun to answer with success. A failure to connect is tried again at once, as often as
    /// configured: nothing has been asked yet.
    async fn send(
        &self,
        request: impl Fn() -> RequestBuilder,
        deadlines: &Deadlines,
    ) -> Result<Response, Error> {
        let mut retries = self.config.retries;
        loop {
            let sent = tokio::time::timeout_at(deadlines.until_first(), request().send()).await;
            match sent.map_err(|_| self.late(Stage::FirstToken, deadlines))? {
                Ok(response) if response.status() == StatusCode::OK => return Ok(response),
                Ok(response) => return Err(self.status_error(response, deadlines).await),
                Err(error) if error.is_connect() && retries > 0 => retries -= 1,
                Err(source) => return Err(Error::from_reqwest(&self.host, &self.base, source)),
            }
        }
    }

    async fn status_error(&self, response: Response, deadlines: &Deadlines) -> Error {
        let status = response.status().as_u16();
        // The status is what counts, also where its explanation is late or lost on the way.
        let soon = Deadlines { total: deadlines.total.min(Instant::now() + EXPLANATION), ..*deadlines };
        let body = stream::collect(&self.host, response, &soon, LONGEST_ERROR).await.unwrap_or_default();
        let message = match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => body.error,
            Err(_) => first_line(&String::from_utf8_lossy(&body)),
        };
        Error::Status { host: self.host.clone(), status, message }
    }

    async fn body<T: DeserializeOwned>(&self, response: Response, deadlines: &Deadlines) -> Result<T, Error> {
        let body = stream::collect(&self.host, response, deadlines, LONGEST_ANSWER).await?;
        serde_json::from_slice(&body)
            .map_err(|_| self.not_ollama(first_line(&String::from_utf8_lossy(&body))))
    }

    fn not_ollama(&self, what: String) -> Error {
        Error::NotOllama { host: self.host.clone(), what }
    }

    fn late(&self, stage: Stage, deadlines: &Deadlines) -> Error {
        Error::Deadline { host: self.host.clone(), stage, limit: deadlines.limits.0.min(deadlines.limits.1) }
    }
}

/// The name as the host lists it: with the tag that it takes where none is said, without the suffix that asks for a
/// local model. A colon before the last slash is a registry's port.
fn with_tag(model: &str) -> String {
    let model = model.strip_suffix(":local").unwrap_or(model);
    let name = model.rsplit('/').next().unwrap_or(model);
    if name.contains(':') { model.to_owned() } else { format!("{model}:latest") }
}

/// `/api/embed` answers 400 also where its runner has failed.
fn crashed(error: Error) -> Error {
    match error {
        Error::Status { host, status: 400, message }
            if ["terminated", "unexpectedly", "out of memory"].iter().any(|sign| message.contains(sign)) =>
        {
            Error::HostReported { host, message }
        }
        other => other,
    }
}

fn first_line(text: &str) -> String {
    text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("").chars().take(200).collect()
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

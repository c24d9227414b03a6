use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::multipart::Form;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use sarai_core::config::HostConfig;
use sarai_core::units::HostName;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::body;
use super::deadlines::Deadlines;
use crate::Error;
use crate::error::Stage;

/// The most of an error's body that is read.
const LONGEST_ERROR: usize = 64 << 10;
/// The most of an answer that is no stream.
const LONGEST_ANSWER: usize = 256 << 20;
/// How long an error's body is waited for.
const EXPLANATION: Duration = Duration::from_secs(1);
/// How long small questions (what is there, the version) may take.
const QUICK: Duration = Duration::from_secs(5);
/// A host that asks for a longer pause than this is asked again all the same.
const LONGEST_PAUSE: Duration = Duration::from_mins(10);

/// A host's address and how to talk to it, whatever it speaks over HTTP.
#[derive(Debug)]
pub(crate) struct Http {
    host: HostName,
    base: Url,
    config: HostConfig,
    client: reqwest::Client,
    /// What the host sends errors as: the text of a body, if it is one.
    error_text: fn(&[u8]) -> Option<String>,
}

impl Http {
    /// Nothing is sent yet.
    pub(crate) fn new(
        host: HostName,
        config: &HostConfig,
        error_text: fn(&[u8]) -> Option<String>,
    ) -> Result<Self, Error> {
        let bad = |reason: String| Error::BadUrl { host: host.clone(), reason };
        let base = Url::parse(&config.url).map_err(|error| bad(error.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
            return Err(bad("it must be http:// or https:// and name a host".to_owned()));
        }
        let client = client(config.connect_timeout)
            .map_err(|source| Error::HttpClient { host: host.clone(), source })?;
        Ok(Self { host, base, config: config.clone(), client, error_text })
    }

    pub(crate) fn host(&self) -> &HostName {
        &self.host
    }

    pub(crate) fn config(&self) -> &HostConfig {
        &self.config
    }

    /// Whether it is this machine, by its address.
    pub(crate) fn is_loopback(&self) -> bool {
        match self.base.host() {
            Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(url::Host::Ipv4(address)) => address.is_loopback() || address.is_unspecified(),
            Some(url::Host::Ipv6(address)) => address.is_loopback() || address.is_unspecified(),
            None => false,
        }
    }

    /// Deadlines of an answer; a host that may have to load the model first has longer for the first token.
    pub(crate) fn deadlines(&self, resident: bool) -> Deadlines {
        let HostConfig { first_token_timeout, load_timeout, stall_timeout, total_timeout, .. } = self.config;
        let load = if resident { Duration::ZERO } else { load_timeout };
        Deadlines::new((first_token_timeout + load).min(total_timeout), stall_timeout, total_timeout)
    }

    /// A small question.
    pub(crate) async fn quick<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let deadlines = Deadlines::within(QUICK);
        let response = self.send(|| self.request(Method::GET, path), &deadlines).await?;
        self.body(response, &deadlines).await
    }

    pub(crate) async fn post(
        &self,
        path: &str,
        body: &impl Serialize,
        deadlines: &Deadlines,
    ) -> Result<Response, Error> {
        self.send(|| self.request(Method::POST, path).json(body), deadlines).await
    }

    /// The same with the parts of a form, which are made anew for each attempt.
    pub(crate) async fn post_form(
        &self,
        path: &str,
        form: impl Fn() -> Form,
        deadlines: &Deadlines,
    ) -> Result<Response, Error> {
        self.send(|| self.request(Method::POST, path).multipart(form()), deadlines).await
    }

    pub(crate) async fn body<T: DeserializeOwned>(
        &self,
        response: Response,
        deadlines: &Deadlines,
    ) -> Result<T, Error> {
        let body = body::collect(&self.host, response, deadlines, LONGEST_ANSWER).await?;
        serde_json::from_slice(&body).map_err(|_| self.unexpected(shown(&body)))
    }

    pub(crate) fn unexpected(&self, what: String) -> Error {
        Error::Protocol { host: self.host.clone(), what }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let mut url = self.base.clone();
        url.set_path(&format!("{}/{path}", self.base.path().trim_end_matches('/')));
        let request = self.client.request(method, url);
        match &self.config.api_key {
            // Marked as secret by the client: it is in no log of it.
            Some(key) => request.bearer_auth(key.expose()),
            None => request,
        }
    }

    /// Sends until the host has begun to answer with success. A failure to connect is tried again at once, as often as
    /// configured: nothing has been asked yet. So is a request whose connection ends without a word, once: many servers close
    /// connections that were kept, and one that is used just then is lost.
    async fn send(
        &self,
        request: impl Fn() -> RequestBuilder,
        deadlines: &Deadlines,
    ) -> Result<Response, Error> {
        let (mut retries, mut may_be_stale) = (self.config.retries, true);
        loop {
            let sent = tokio::time::timeout_at(deadlines.until_first(), request().send()).await;
            match sent.map_err(|_| self.late(Stage::FirstToken, deadlines))? {
                Ok(response) if response.status() == StatusCode::OK => return Ok(response),
                Ok(response) => return Err(self.status_error(response, deadlines).await),
                // One that did not answer in time would not the next time either.
                Err(error) if error.is_connect() && !error.is_timeout() && retries > 0 => retries -= 1,
                Err(error)
                    if error.is_request() && !error.is_connect() && !error.is_timeout() && may_be_stale =>
                {
                    may_be_stale = false;
                }
                Err(source) => return Err(Error::from_reqwest(&self.host, &self.base, source)),
            }
        }
    }

    pub(crate) fn late(&self, stage: Stage, deadlines: &Deadlines) -> Error {
        Error::Deadline { host: self.host.clone(), stage, limit: deadlines.limits.0.min(deadlines.limits.1) }
    }

    async fn status_error(&self, response: Response, deadlines: &Deadlines) -> Error {
        let status = response.status().as_u16();
        let retry_after = retry_after(response.headers());
        // The status is what counts, also where its explanation is late or lost on the way.
        let soon =
            Deadlines { total: deadlines.total.min(tokio::time::Instant::now() + EXPLANATION), ..*deadlines };
        let body = body::collect(&self.host, response, &soon, LONGEST_ERROR).await.unwrap_or_default();
        let message = (self.error_text)(&body).map_or_else(|| shown(&body), |text| cut(&text));
        Error::Status { host: self.host.clone(), status, message, retry_after }
    }
}

/// The one client of all hosts with the same deadline for connecting, which is the client's own; it keeps the connections.
fn client(connect_timeout: Duration) -> reqwest::Result<reqwest::Client> {
    static CLIENTS: OnceLock<Mutex<BTreeMap<Duration, reqwest::Client>>> = OnceLock::new();
    let mut clients = CLIENTS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(client) = clients.get(&connect_timeout) {
        return Ok(client.clone());
    }
    // The first caller's provider is as good as ours.
    let _there_already = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .connect_timeout(connect_timeout)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("sarai/", env!("CARGO_PKG_VERSION")))
        .tcp_nodelay(true)
        .no_proxy()
        .build()?;
    clients.insert(connect_timeout, client.clone());
    Ok(client)
}

/// The pause that a busy host asks for, in seconds. A date, which it may be as well, says nothing where clocks differ.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_PAUSE))
}

/// The first line of what came, for an error.
pub(crate) fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    cut(text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or(""))
}

/// A host's own words, for an error: not more than a person reads.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(300).collect()
}

use std::error::Error as StdError;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::request::Capability;
use sarai_core::units::{Bytes, HostName};

/// How running a model can fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // GGUF files in process
    /// The file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not a model that can be loaded.
    #[error("{} {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file is a model, but not for this.
    #[error("{} cannot {wanted}: {reason}", path.display())]
    WrongModel {
        /// The file.
        path: PathBuf,
        /// What was wanted of it.
        wanted: String,
        /// Why not.
        reason: String,
    },
    /// llama.cpp did not load the file, although its header is in order.
    #[error("llama.cpp could not load {}; run with SARAI_LOG=debug to see its log", path.display())]
    LoadFailed {
        /// The file.
        path: PathBuf,
    },
    /// llama.cpp did not make a context.
    #[error("llama.cpp could not make a context of {n_ctx} tokens for {}; run with SARAI_LOG=debug to see its log", path.display())]
    ContextFailed {
        /// The file.
        path: PathBuf,
        /// The context's length.
        n_ctx: u32,
    },
    /// The load was stopped by its caller.
    #[error("the load of {} was stopped", path.display())]
    LoadCancelled {
        /// The file.
        path: PathBuf,
    },
    /// llama.cpp could not be started.
    #[error("llama.cpp could not be started")]
    Runtime {
        /// What the binding says.
        #[source]
        source: std::sync::Arc<llama_cpp_2::LlamaCppError>,
    },
    /// The prompt leaves no room in the context.
    #[error("the prompt has {tokens} tokens, and the context of {n_ctx} must leave room for an answer")]
    PromptTooLong {
        /// The prompt's tokens.
        tokens: usize,
        /// The context's length.
        n_ctx: u32,
    },
    /// A text to embed or classify is longer than the context.
    #[error("text {index} has {tokens} tokens, more than the context of {n_ctx}")]
    TextTooLong {
        /// Which text, from 0.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// The context's length.
        n_ctx: u32,
    },
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// An adapter is not one, or not for this model.
    #[error("{} is no LoRA adapter for {}; run with SARAI_LOG=debug to see llama.cpp's log", path.display(), model.display())]
    BadAdapter {
        /// The adapter's file.
        path: PathBuf,
        /// The model's file.
        model: PathBuf,
    },
    /// A conversation could not be written to the session store.
    #[error("cannot write to {}", folder.display())]
    WriteSession {
        /// The store's folder.
        folder: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A JSON schema is broken, or asks for what cannot be ensured while tokens are chosen.
    #[error("the JSON schema cannot be used: {reason}")]
    BadSchema {
        /// What is wrong with it.
        reason: String,
    },
    /// A grammar is broken.
    #[error("the grammar cannot be used: {reason}")]
    BadGrammar {
        /// What is wrong with it.
        reason: String,
    },
    /// A bias is for a token that the model does not have.
    #[error("the request has a logit bias for token {token}, but the model's vocabulary ends at {last}")]
    NoSuchToken {
        /// The token's number.
        token: u32,
        /// The largest number.
        last: u32,
    },
    /// A constrained answer cannot go on.
    #[error("the answer cannot go on in the form that was asked for: {reason}")]
    Constraint {
        /// Why not.
        reason: String,
    },
    /// The request has images, and the model has no projector for them.
    #[error("the model does not see images: it has no mmproj with a vision encoder")]
    CannotSee,
    /// The request has audio, and the model has no projector for it.
    #[error("the model does not hear audio: it has no mmproj with an audio encoder")]
    CannotHear,
    /// An image of the request cannot be read.
    #[error("the image cannot be read: {reason}")]
    BadImage {
        /// What is wrong with it.
        reason: String,
    },
    /// Audio of the request cannot be read.
    #[error("the audio cannot be read: {reason}")]
    BadAudio {
        /// What is wrong with it.
        reason: String,
    },
    /// Audio of the request is longer than what is read at once.
    #[error("the audio is longer than {} minutes; cut it into parts", longest.as_secs() / 60)]
    AudioTooLong {
        /// The most.
        longest: Duration,
    },
    /// Audio of the request has no samples.
    #[error("the audio is empty")]
    EmptyAudio,
    /// Audio of the request is silent from beginning to end.
    #[error("there is nothing to hear in the audio: it is silent")]
    SilentAudio,
    /// The model's chat template does not show all images and audio of the messages.
    #[error("the model's chat template shows {kept} of {there} images and sounds")]
    TemplateDropsMedia {
        /// How many there are.
        there: usize,
        /// How many the template shows.
        kept: usize,
    },
    /// The request asks for things that do not go together, or has a value that cannot be.
    #[error("{what}")]
    Contradiction {
        /// Which.
        what: &'static str,
    },
    /// The model's own chat template is broken or refuses these messages.
    #[error("the model's chat template failed")]
    ChatTemplate {
        /// What the template engine says.
        #[from]
        source: minijinja::Error,
    },
    /// A step of the computation failed.
    #[error("llama.cpp failed to compute: {reason}")]
    Compute {
        /// What the binding says.
        reason: String,
    },
    /// The thread that ran the model is gone.
    #[error("the engine of {} has ended", path.display())]
    EngineGone {
        /// The model's file.
        path: PathBuf,
    },

    // Hosts over HTTP
    /// A host's address is not one.
    #[error("host {host}: bad url: {reason}")]
    BadUrl {
        /// The host.
        host: HostName,
        /// What is wrong with it.
        reason: String,
    },
    /// The HTTP client could not be made.
    #[error("host {host}: no HTTP client could be made")]
    HttpClient {
        /// The host.
        host: HostName,
        /// What the client says.
        source: reqwest::Error,
    },
    /// No connection to the host.
    #[error("{reason} ({url})")]
    Connect {
        /// Where.
        url: String,
        /// What the system says.
        reason: String,
        /// What the client says, with the system's word at its end.
        error: reqwest::Error,
    },
    /// The host did not keep to a deadline.
    #[error("host {host}: {stage} took longer than {:.1} s", limit.as_secs_f64())]
    Deadline {
        /// The host.
        host: HostName,
        /// What took too long.
        stage: Stage,
        /// The limit.
        limit: Duration,
    },
    /// The host answered with an error.
    #[error("host {host}: status {status}{}{message}", if message.is_empty() { "" } else { ": " })]
    Status {
        /// The host.
        host: HostName,
        /// The HTTP status.
        status: u16,
        /// What the host says.
        message: String,
        /// When it wants to be asked again, where it says so.
        retry_after: Option<Duration>,
    },
    /// The host does not have the model.
    #[error("host {host}: status 404: {message}")]
    ModelMissing {
        /// The host.
        host: HostName,
        /// What the host says, what it has instead where it tells, and what to do about it.
        message: String,
    },
    /// The host's protocol has no words for what is asked. Another host may have.
    #[error("host {host} cannot {what}: its protocol has no words for it")]
    HostCannot {
        /// The host.
        host: HostName,
        /// What is asked.
        what: Capability,
    },
    /// The host has no room for the model below its limit: all that it holds is in use or kept.
    #[error(
        "host {host} holds {held} and would hold {more} more, above its max_ram_gb of {limit}, and nothing of it is idle"
    )]
    HostFull {
        /// The host.
        host: HostName,
        /// What it holds.
        held: Bytes,
        /// What comes on top.
        more: Bytes,
        /// Its limit.
        limit: Bytes,
    },
    /// The host ended its answer with an error.
    #[error("host {host}: {message}")]
    HostReported {
        /// The host.
        host: HostName,
        /// What the host says.
        message: String,
    },
    /// What came is not what such a host sends.
    #[error("host {host} does not speak the protocol of its kind: {what}")]
    Protocol {
        /// The host.
        host: HostName,
        /// What came instead.
        what: String,
    },
    /// The answer ended before its end was announced.
    #[error("host {host}: the answer was cut off")]
    CutOff {
        /// The host.
        host: HostName,
        /// What the client says, where the connection broke.
        source: Option<reqwest::Error>,
    },
}

/// A stage of a request to a host, each with a deadline of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for one of the host's places.
    Queue,
    /// Until the first token: the host's own queue, its load and the prompt.
    FirstToken,
    /// Between tokens.
    Stall,
    /// The whole answer.
    Total,
    /// Until an unload is confirmed.
    Unload,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queue => "waiting for a place",
            Self::FirstToken => "the first token",
            Self::Stall => "a pause between tokens",
            Self::Total => "the whole answer",
            Self::Unload => "the unload",
        })
    }
}

impl Error {
    /// What the HTTP client's error means. The address is shown without user and password.
    pub(crate) fn from_reqwest(host: &HostName, url: &Url, source: reqwest::Error) -> Self {
        if source.is_connect() || source.is_timeout() {
            let url = url.origin().ascii_serialization();
            let reason =
                if source.is_timeout() { "no connection in time".to_owned() } else { root_cause(&source) };
            return Self::Connect { url, reason, error: source.without_url() };
        }
        Self::CutOff { host: host.clone(), source: Some(source.without_url()) }
    }

    /// What kind of failure this is to the pool.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::ReadFile { .. } => FailureKind::FileMissing,
            // A wrong file is not the request's fault: another place may have the right one.
            Self::BadFile { .. } | Self::LoadFailed { .. } | Self::WrongModel { .. } => FailureKind::BadFile,
            Self::LoadCancelled { .. } => FailureKind::Cancelled,
            Self::PromptTooLong { .. } | Self::TextTooLong { .. } => FailureKind::ContextOverflow,
            Self::BadAdapter { .. } => FailureKind::BadFile,
            Self::BadImage { .. } | Self::BadAudio { .. } | Self::AudioTooLong { .. } => {
                FailureKind::BadMedia
            }
            Self::EmptyAudio | Self::SilentAudio => FailureKind::NoSpeech,
            Self::CannotSee | Self::CannotHear => FailureKind::Unsupported,
            Self::EmptyPrompt
            | Self::ChatTemplate { .. }
            | Self::TemplateDropsMedia { .. }
            | Self::BadSchema { .. }
            | Self::BadGrammar { .. }
            | Self::NoSuchToken { .. }
            | Self::Contradiction { .. } => FailureKind::BadRequest,
            Self::Connect { .. } => FailureKind::Unreachable,
            Self::Deadline { stage: Stage::Queue, .. } => FailureKind::Busy,
            Self::Deadline { .. } => FailureKind::Timeout,
            Self::Status { status: 400, message, .. } if is_overflow(message) => FailureKind::ContextOverflow,
            Self::Status { status, .. } => match status {
                401 | 403 => FailureKind::Denied,
                // Also where the host does not have the path: to the rest of the chain it is the same.
                404 | 405 | 501 => FailureKind::ModelMissing,
                408 => FailureKind::Timeout,
                429 | 503 => FailureKind::Busy,
                400..=499 => FailureKind::Refused,
                500..=599 => FailureKind::HostError,
                _ => FailureKind::Protocol,
            },
            // To the rest of the chain it is as if the host did not have the model.
            Self::ModelMissing { .. } | Self::HostCannot { .. } => FailureKind::ModelMissing,
            Self::HostFull { .. } => FailureKind::Busy,
            Self::HostReported { .. } => FailureKind::HostError,
            Self::Protocol { .. } => FailureKind::Protocol,
            Self::CutOff { .. } => FailureKind::CutOff,
            Self::BadUrl { .. } => FailureKind::BadRequest,
            Self::HttpClient { .. }
            | Self::ContextFailed { .. }
            | Self::Runtime { .. }
            | Self::Constraint { .. }
            | Self::WriteSession { .. }
            | Self::Compute { .. } => FailureKind::Engine,
            Self::EngineGone { .. } => FailureKind::EngineGone,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error)
    }
}

/// Whether a host's message says that the prompt or a text does not fit the context.
fn is_overflow(message: &str) -> bool {
    message.contains("context")
        && ["exceed", "too long", "maximum context length"].iter().any(|sign| message.contains(sign))
}

/// The deepest cause of an error, which is the system's own word for it.
fn root_cause(error: &(dyn StdError + 'static)) -> String {
    let mut deepest = error;
    while let Some(below) = deepest.source() {
        deepest = below;
    }
    deepest.to_string()
}

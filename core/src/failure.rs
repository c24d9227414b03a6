//! How a backend fails: a kind that decides what happens next, and the cause as the backend reports it.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

/// What kind of failure it was. The pool decides by this alone whether another backend may answer instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// No connection: refused, no route, unknown host name, TLS.
    Unreachable,
    /// A deadline of the backend passed: connecting, first token, a stall, or the whole.
    Timeout,
    /// The host answered with a server error (5xx).
    HostError,
    /// The host is busy (429, 503).
    Busy,
    /// The host does not have the model (404).
    ModelMissing,
    /// The answer was not what the protocol says: a proxy's HTML page, broken JSON.
    Protocol,
    /// The answer ended before its end was announced.
    CutOff,
    /// The host lets nobody in, or not us (401, 403).
    Denied,
    /// The host refused the request as such (other 4xx).
    Refused,
    /// A local file is missing or unreadable.
    FileMissing,
    /// A local file is not a usable model.
    BadFile,
    /// The prompt, or one text, does not fit the model's context.
    ContextOverflow,
    /// The request cannot be carried out as given: an empty prompt, a template that refuses the messages.
    BadRequest,
    /// An image or audio of the request is none: broken, of an unknown form, too large.
    BadMedia,
    /// There is nothing to transcribe: the audio is empty or silent.
    NoSpeech,
    /// This model cannot do what was asked.
    Unsupported,
    /// The caller went away.
    Cancelled,
    /// The engine failed on the request: out of memory, a failed decode.
    Engine,
    /// The loaded model is gone: its thread or process has ended. The pool unloads what is left of it.
    EngineGone,
}

impl FailureKind {
    /// Whether another backend of the same model may answer instead, as long as no text has been passed on.
    /// What is wrong with the request itself would be wrong everywhere.
    #[must_use]
    pub const fn allows_fallback(self) -> bool {
        match self {
            Self::Unreachable
            | Self::Timeout
            | Self::HostError
            | Self::Busy
            | Self::ModelMissing
            | Self::Denied
            | Self::Protocol
            | Self::CutOff
            | Self::FileMissing
            | Self::BadFile
            | Self::Engine
            | Self::EngineGone => true,
            Self::Refused
            | Self::ContextOverflow
            | Self::BadRequest
            | Self::BadMedia
            | Self::NoSpeech
            | Self::Unsupported
            | Self::Cancelled => false,
        }
    }

    /// The kind's name in metrics and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::HostError => "host_error",
            Self::Busy => "busy",
            Self::ModelMissing => "model_missing",
            Self::Protocol => "protocol",
            Self::CutOff => "cut_off",
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::FileMissing => "file_missing",
            Self::BadFile => "bad_file",
            Self::ContextOverflow => "context_overflow",
            Self::BadRequest => "bad_request",
            Self::BadMedia => "bad_media",
            Self::NoSpeech => "no_speech",
            Self::Unsupported => "unsupported",
            Self::Cancelled => "cancelled",
            Self::Engine => "engine",
            Self::EngineGone => "engine_gone",
        }
    }
}

/// A backend's failure: its kind and its cause. Cheap to clone, because every waiter of a failed load hears of it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What kind of failure it was.
    pub kind: FailureKind,
    cause: Arc<dyn StdError + Send + Sync>,
}

impl Failure {
    /// A failure of `kind` with its cause: the backend's own error, or a sentence.
    pub fn new(kind: FailureKind, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { kind, cause: Arc::from(cause.into()) }
    }
}

/// The cause and everything below it, in one line.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        let mut below = self.cause.source();
        while let Some(error) = below {
            write!(f, ": {error}")?;
            below = error.source();
        }
        Ok(())
    }
}

/// No source: the causes are part of the message.
impl StdError for Failure {}

//! What the pool asks of whatever runs a model. A backend knows nothing of the pool, and the scheduler nothing of
//! backends.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Serialize, Serializer};
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, FailureKind};
use crate::memory::{Estimate, Footprint, Freed};
use crate::request::{
    Capabilities, Capability, Embeddings, GenerateRequest, LabelScore, TokenStream, TranscribeRequest,
};
use crate::units::{Bytes, HostName};

/// Who answers: shown in every answer as `served_by`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServedBy {
    /// A GGUF file in this process.
    GgufNative(PathBuf),
    /// A model of an Ollama host.
    OllamaHttp(HostName),
    /// A model of a host that speaks OpenAI's API.
    OpenaiHttp(HostName),
    /// One of these hosts: a place's name. Each answer says which it was.
    OneOf(Vec<ServedBy>),
}

impl fmt::Display for ServedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GgufNative(file) => write!(f, "gguf_native:{}", file.display()),
            Self::OllamaHttp(host) => write!(f, "ollama_http:{host}"),
            Self::OpenaiHttp(host) => write!(f, "openai_http:{host}"),
            Self::OneOf(hosts) => {
                for (at, host) in hosts.iter().enumerate() {
                    write!(f, "{}{host}", if at > 0 { "|" } else { "" })?;
                }
                Ok(())
            }
        }
    }
}

impl Serialize for ServedBy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Receives the progress of a load, from 0 to 1. Called from the loading thread: it must not block.
pub type Progress = Arc<dyn Fn(f32) + Send + Sync>;

/// Receives what becomes of a model's hosts. Called from whoever asked one: it must not block.
pub type HostReport = Arc<dyn Fn(HostChange) + Send + Sync>;

/// Whether a host is asked for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Breaker {
    /// It is.
    Closed,
    /// It is asked once, to see whether it answers again.
    HalfOpen,
    /// It failed several times in a row, and is left alone for a while.
    Open,
}

impl Breaker {
    /// The state's name in tables, metrics and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }
}

/// A host is given up for a model, or asked again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostChange {
    /// The host.
    pub host: ServedBy,
    /// What holds from now on.
    pub breaker: Breaker,
    /// The failure that brought it about, if one did.
    pub cause: Option<String>,
}

/// A host of a place, as it stands with a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostState {
    /// The host.
    pub host: ServedBy,
    /// The model's name there.
    pub model: String,
    /// Whether it is asked.
    pub breaker: Breaker,
    /// Milliseconds until it is asked again, where it is left alone or has said that it is busy.
    pub asked_again_in_ms: Option<u64>,
    /// Its last failure, where it has not answered since.
    pub failure: Option<String>,
    /// Requests that run on it, of all models.
    pub in_flight: usize,
    /// The most that may.
    pub parallel: usize,
    /// Whether it holds the model in memory, where that is known.
    pub resident: Option<bool>,
}

/// What the choice of a host depends on.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The same for all turns of a conversation that has had an answer; the host that gave it has most of the next prompt
    /// computed already.
    pub conversation: Option<u64>,
    /// Hosts that have failed on this request.
    pub failed: &'a [ServedBy],
    /// Whether there is nowhere else to go: then a host is asked that would be left alone otherwise.
    pub last_resort: bool,
}

/// A host that was chosen, with a place among those that it serves at once. Dropping it gives the place free.
#[derive(Clone, Debug)]
pub struct Host {
    /// Who it is.
    pub served_by: ServedBy,
    /// The model there.
    pub model: Arc<dyn Model>,
}

/// The choice among the hosts that a model runs on.
#[async_trait]
pub trait Hosts: Send + Sync {
    /// The host to ask next, once it has a place free; `None` when all have failed on this request.
    ///
    /// # Errors
    /// All hosts that are left are left alone after failures, or say that they are busy, and this is not the last resort; or
    /// none had a place free in time.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is sent.
    async fn next(&self, asked: Asked<'_>) -> Result<Option<Host>, Failure>;

    /// How they stand.
    fn states(&self) -> Vec<HostState>;
}

/// What a load gets from the pool.
#[derive(Clone)]
pub struct LoadRequest {
    /// The estimate whose total is reserved; its `n_ctx` is the context to make.
    pub estimate: Estimate,
    /// Cancelled when nobody wants the model any more; the load then stops and fails with
    /// [`FailureKind::Cancelled`].
    pub cancel: CancellationToken,
    /// Hears how far the load has come.
    pub progress: Progress,
    /// Hears of hosts that are given up for a while, and of those that answer again, for as long as the model lives.
    pub hosts: HostReport,
}

impl LoadRequest {
    /// A load of this size that nobody watches or stops.
    #[must_use]
    pub fn new(estimate: Estimate) -> Self {
        Self {
            estimate,
            cancel: CancellationToken::new(),
            progress: Arc::new(|_| {}),
            hosts: Arc::new(|_| {}),
        }
    }
}

impl fmt::Debug for LoadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadRequest").field("estimate", &self.estimate).finish_non_exhaustive()
    }
}

/// A way to run one model: a GGUF file with its settings, or a model name on a host. Loads it as often as asked.
#[async_trait]
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// Who will answer.
    fn served_by(&self) -> ServedBy;

    /// What the model can be asked for.
    fn capabilities(&self) -> Capabilities;

    /// Requests that may run on it at once. The pool lets no more through; zero counts as one.
    fn parallel(&self) -> usize {
        1
    }

    /// How much memory of this process a load will take, with `available` bytes left for it. Reads at most the
    /// file's header. A model on a host takes none.
    ///
    /// # Errors
    /// The file is missing, unreadable or not a usable model.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is kept.
    async fn estimate(&self, available: Bytes) -> Result<Estimate, Failure>;

    /// Makes the model ready to answer.
    ///
    /// # Errors
    /// The file or host is not usable, or the load was cancelled through the request's token. After an error nothing
    /// is held any more.
    ///
    /// # Cancel safety
    /// Not cancel safe: run it to its end, and stop it through the request's token.
    async fn load(&self, request: LoadRequest) -> Result<Arc<dyn Model>, Failure>;

    /// The hosts that it runs on, where it runs on hosts.
    fn hosts(&self) -> Option<&dyn Hosts> {
        None
    }

    /// Whether it is of any use to ask now. The pool asks before it waits for the model, if there is another place to go.
    ///
    /// # Errors
    /// What it failed with the last time: all its hosts are left alone for now.
    fn available(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Has the hosts that run the model free its memory, without deleting anything; returns those that were asked. A local
    /// backend has none.
    ///
    /// # Errors
    /// A host cannot be reached, refuses, or does not confirm in time.
    ///
    /// # Cancel safety
    /// Cancel safe: a host may or may not have got the request.
    async fn unload_on_hosts(&self) -> Result<Vec<ServedBy>, Failure> {
        Ok(Vec::new())
    }
}

/// A model that is ready to answer. Methods for capabilities that its backend does not state fail with
/// [`FailureKind::Unsupported`].
#[async_trait]
pub trait Model: fmt::Debug + Send + Sync + 'static {
    /// The context length in tokens, where it is known.
    fn n_ctx(&self) -> Option<u32>;

    /// What the model holds of this process's memory, as measured: what is resident of its file just now, and by what
    /// the process's own memory grew with its load. `None` where nothing can be measured. May take a tenth of a second
    /// for a large model: the kernel's page tables are read.
    fn memory(&self) -> Option<Footprint>;

    /// What the load, and the work since, added to this process's memory, as measured while that happened. Asked for after
    /// each request, so it has to be cheap: nothing is measured now.
    fn memory_at_load(&self) -> Option<Footprint> {
        self.memory()
    }

    /// Gives the model a context of another length, one of its estimate's. What it has computed of conversations is kept
    /// elsewhere or computed again. The pool calls it when no request runs.
    ///
    /// # Errors
    /// The context cannot be made. The model is of no use then, and has to be unloaded.
    ///
    /// # Cancel safety
    /// Not cancel safe: run it to its end.
    async fn resize(&self, _n_ctx: u32) -> Result<(), Failure> {
        Err(Failure::new(FailureKind::Unsupported, "this backend's contexts have one length"))
    }

    /// Continues a prompt.
    ///
    /// # Errors
    /// The request is refused as such, or the backend fails before it has an answer to stream.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future, or later the stream, stops the work.
    async fn generate(&self, _request: GenerateRequest) -> Result<TokenStream, Failure> {
        Err(unsupported(Capability::Generate))
    }

    /// Writes down what is said in audio.
    ///
    /// # Errors
    /// The audio cannot be read ([`FailureKind::BadMedia`]), there is nothing in it to transcribe
    /// ([`FailureKind::NoSpeech`]), or the backend fails before it has an answer to stream.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future, or later the stream, stops the work.
    async fn transcribe(&self, _request: TranscribeRequest) -> Result<TokenStream, Failure> {
        Err(unsupported(Capability::Transcribe))
    }

    /// Embeds texts; every vector has length 1.
    ///
    /// # Errors
    /// A text is longer than the model's context, or the backend fails.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future stops the work.
    async fn embed(&self, _texts: Vec<String>) -> Result<Embeddings, Failure> {
        Err(unsupported(Capability::Embed))
    }

    /// Scores `text` for each label of the model's classification head, highest first.
    ///
    /// # Errors
    /// The text is longer than the model's context, or the backend fails.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future stops the work.
    async fn classify(&self, _text: String) -> Result<Vec<LabelScore>, Failure> {
        Err(unsupported(Capability::Classify))
    }

    /// Scores each of `documents` for how well it answers `query`, from 0 to 1, in the documents' order.
    ///
    /// # Errors
    /// A pair is longer than the model's context, or the backend fails.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future stops the work.
    async fn rerank(&self, _query: String, _documents: Vec<String>) -> Result<Vec<f32>, Failure> {
        Err(unsupported(Capability::Rerank))
    }

    /// Gives the model's local memory back; returns when it is back, with what came back where that could be measured. The
    /// pool calls it once, when no request runs.
    async fn unload(&self) -> Option<Freed>;
}

fn unsupported(capability: Capability) -> Failure {
    Failure::new(FailureKind::Unsupported, format!("this backend cannot {capability}"))
}

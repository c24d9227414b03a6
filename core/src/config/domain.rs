//! What the program works with: the configuration after every check and default.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::answer::OnStreamFailure;
use crate::request::{Capability, Sampling};
use crate::scheduler::Eviction;
use crate::tone::Tones;
use crate::units::{ApiKey, Bytes, HostName, ModelName, PipelineName, StepId};

/// A whole, checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Remote hosts by name.
    pub hosts: BTreeMap<HostName, HostConfig>,
    /// Logical models by name.
    pub models: BTreeMap<ModelName, ModelConfig>,
    /// The router, where one is configured.
    pub router: Option<RouterConfig>,
    /// The budget and its limits.
    pub memory: MemoryConfig,
    /// How many requests may wait, and how long.
    pub queue: QueueConfig,
    /// What is kept of conversations when their model is unloaded.
    pub sessions: SessionsConfig,
    /// The Prometheus endpoint, where one is configured.
    pub metrics: Option<MetricsConfig>,
    /// Tones by name.
    pub tones: Tones,
    /// Pipelines by name.
    pub pipelines: BTreeMap<PipelineName, PipelineConfig>,
}

/// The protocol that a host speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostKind {
    /// Ollama's own.
    #[default]
    Ollama,
    /// OpenAI's: llama-server, vLLM, LiteLLM, LM Studio, another sarai.
    Openai,
}

/// A remote host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostConfig {
    /// The protocol it speaks.
    pub kind: HostKind,
    /// Base address, `http://` or `https://`, without a path.
    pub url: String,
    /// The key that it is sent, where it wants one.
    pub api_key: Option<ApiKey>,
    /// What its models may take of its memory together; of an Ollama alone.
    pub max_ram: Option<Bytes>,
    /// How often an Ollama's models are looked at; `None` leaves it alone.
    pub watch_interval: Option<Duration>,
    /// How long a connection may take to open.
    pub connect_timeout: Duration,
    /// How long the first token may take, the host's own queue included. A host of OpenAI's kind writes down a recording in
    /// one piece: that may take a second longer for each 16 kB of it.
    pub first_token_timeout: Duration,
    /// How much longer it may take where the host does not surely hold the model, and may have to load it.
    pub load_timeout: Duration,
    /// How long the stream may pause between tokens.
    pub stall_timeout: Duration,
    /// How long a whole answer may take.
    pub total_timeout: Duration,
    /// How often a request is tried again after a failure to connect.
    pub retries: u32,
    /// Requests that may run on it at once.
    pub parallel: usize,
    /// How long the host is asked to keep a model after a request.
    pub keep_alive: Duration,
    /// Whether a host that speaks OpenAI's protocol goes on with a last message of the assistant's.
    pub continues: bool,
}

/// A logical model: one name, and one or more places that can serve it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// What it is for.
    pub role: ModelRole,
    /// How hard the pool holds on to it.
    pub class: Class,
    /// Where it can run, first choice first; never empty. The rest are fallbacks.
    pub places: Vec<Place>,
    /// Unloaded after this long without a request; `None` keeps it until its memory is needed.
    pub ttl: Option<Duration>,
    /// What becomes of an answer whose place fails in the middle.
    pub on_stream_failure: OnStreamFailure,
    /// When a host has said nothing for this long, the next place is made ready.
    pub hedge_after: Option<Duration>,
}

/// A place that can serve a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// A GGUF file in this process.
    Gguf(GgufConfig),
    /// A model on remote hosts of one kind; one of them is chosen for each request.
    Hosts {
        /// The protocol of all of them.
        kind: HostKind,
        /// The hosts in order of preference; never empty.
        hosts: Vec<OnHost>,
        /// The context length to ask for; `None` leaves it to the host.
        n_ctx: Option<u32>,
    },
    /// Another logical model, with all its own places. Never the first place.
    Model(ModelName),
}

/// A model on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnHost {
    /// The host.
    pub host: HostName,
    /// The model's name there.
    pub model: String,
}

/// A GGUF file and how to load it.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufConfig {
    /// The file.
    pub path: PathBuf,
    /// The context length.
    pub context: Context,
    /// How the weights are held.
    pub weights: Weights,
    /// What keys and values are kept as.
    pub kv_cache_type: KvCacheType,
    /// CPU threads; `None` takes all that the process may use.
    pub threads: Option<usize>,
    /// Requests that may run at once; `None` leaves it to the engine.
    pub parallel: Option<usize>,
    /// LoRA adapters, and the scale of each.
    pub lora: Vec<(PathBuf, f32)>,
    /// The projector for images and audio.
    pub mmproj: Option<PathBuf>,
    /// The projector's memory is given back after so long without an image or audio.
    pub projector_ttl: Option<Duration>,
}

/// What a model is for. Only LLMs count for `max_concurrent_llms`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelRole {
    /// Generates text.
    #[default]
    Llm,
    /// Embeds text.
    Embedding,
    /// Classifies text for the router.
    Router,
    /// Scores documents for a query.
    Reranker,
}

impl ModelRole {
    /// What a model of this role is asked for.
    #[must_use]
    pub const fn capability(self) -> Capability {
        match self {
            Self::Llm => Capability::Generate,
            Self::Embedding => Capability::Embed,
            Self::Router => Capability::Classify,
            Self::Reranker => Capability::Rerank,
        }
    }
}

/// How hard the pool holds on to a model. Victims are sought from the last class upwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Given up first.
    Ephemeral,
    /// Loaded when asked for, given up when memory is needed.
    OnDemand,
    /// Given up only when nothing else suffices.
    Preferred,
    /// Loaded at start and pinned.
    Resident,
}

impl Class {
    /// The class's name in tables and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ephemeral => "ephemeral",
            Self::OnDemand => "on_demand",
            Self::Preferred => "preferred",
            Self::Resident => "resident",
        }
    }
}

/// The context length of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// Chosen at load by free memory, between `min` and `max`, never above what the model was trained for.
    Auto {
        /// At least this many tokens.
        min: u32,
        /// At most this many tokens.
        max: u32,
    },
    /// This many tokens.
    Fixed(u32),
}

/// How a model's weights are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// Chosen by class.
    #[default]
    Auto,
    /// A plain map of the file: loads at once, the kernel can take pages back.
    Mmap,
    /// Read into memory and repacked for this CPU.
    Repack,
}

/// What the keys and values of a context are kept as, by the names of ggml's types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KvCacheType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    #[default]
    F16,
    /// 16-bit floats with the range of 32-bit ones.
    Bf16,
    /// 8 bits and a scale for each 32: about half of f16.
    Q8_0,
    /// 5 bits, a scale and a minimum.
    Q5_1,
    /// 5 bits and a scale.
    Q5_0,
    /// 4 bits of a table, and a scale.
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
    /// 4 bits, a scale and a minimum.
    Q4_1,
    /// 4 bits and a scale: little more than a quarter of f16.
    Q4_0,
}

impl KvCacheType {
    /// Numbers that are kept together, and the bytes that they take (`ggml_blck_size` and `ggml_type_size`).
    #[must_use]
    pub const fn block(self) -> (u32, u32) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q5_1 => (32, 24),
            Self::Q5_0 => (32, 22),
            Self::Q4_1 => (32, 20),
            Self::Iq4Nl | Self::Q4_0 => (32, 18),
        }
    }
}

/// How requests find their model.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterConfig {
    /// How texts are scored.
    pub kind: RouterKind,
    /// Conditions on the scores of several labels, with the model for each: the first that holds goes before `routes`.
    pub rules: Vec<RouterRule>,
    /// The model for each label; a label without one takes the default.
    pub routes: BTreeMap<String, ModelName>,
    /// The model when no label wins.
    pub default: Option<ModelName>,
    /// The score a label needs to win, from 0 to 1.
    pub threshold: f32,
}

/// A condition on a text's scores, and the model that it leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterRule {
    /// An expression over the labels' scores, by their names, such as `hard >= 0.5 and soft >= 0.5`.
    pub when: String,
    /// The model.
    pub model: ModelName,
}

/// How a router scores a text.
#[derive(Clone, Debug, PartialEq)]
pub enum RouterKind {
    /// By the likeness of its embedding to example texts of each label.
    Similarity {
        /// The embedding model.
        model: ModelName,
        /// Example texts by label.
        labels: BTreeMap<String, Vec<String>>,
    },
    /// By a model with a classification head.
    Classifier {
        /// The model.
        model: ModelName,
    },
}

/// The budget and its limits.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryConfig {
    /// All that this process may hold for models.
    pub budget: Budget,
    /// How many LLMs may be loaded or loading at once, remote ones included.
    pub max_concurrent_llms: usize,
    /// Where models run.
    pub strategy: Strategy,
    /// Who is evicted first, within a class.
    pub eviction: Eviction,
    /// How often the machine's memory is looked at without a cause.
    pub monitor_interval: Duration,
    /// Whether the budget holds for all of the user's processes together that say so.
    pub shared: bool,
    /// Whether the models that were loaded at a shutdown are loaded again at the next start.
    pub restore: bool,
}

/// How much memory models may hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// So much.
    Of(Bytes),
    /// Three quarters of what this process could ever have.
    Auto,
}

impl Budget {
    /// The budget in bytes on a machine with `total` memory. Where the platform does not tell, `Auto` is 6 GB.
    #[must_use]
    pub fn bytes(self, total: Option<Bytes>) -> Bytes {
        match (self, total) {
            (Self::Of(bytes), _) => bytes,
            (Self::Auto, Some(total)) => Bytes(total.0 / 4 * 3),
            (Self::Auto, None) => Bytes::from_gb(6.0),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Of(bytes) => bytes.fmt(f),
            Self::Auto => f.write_str("three quarters of the machine's memory"),
        }
    }
}

/// Where models run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// As each model says: hosts and local files.
    #[default]
    HybridHttpGguf,
    /// Local files only: places on hosts are left out.
    GgufOnly,
    /// Hosts only for models that name one: their local places are left out.
    HttpOnly,
}

/// How many requests may wait, and how long.
#[derive(Clone, Debug, PartialEq)]
pub struct QueueConfig {
    /// Requests that may wait at once, over all models.
    pub max_waiting: usize,
    /// How long a request waits for its model unless it says otherwise.
    pub wait_timeout: Duration,
}

/// What is kept of conversations when their model is unloaded.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionsConfig {
    /// The folder; `None` is one in the user's cache folder.
    pub path: Option<PathBuf>,
    /// How large it may grow; zero keeps nothing.
    pub max_bytes: Bytes,
}

/// The Prometheus endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricsConfig {
    /// Where it listens.
    pub listen: SocketAddr,
}

/// A pipeline as the configuration has it: checked for its keys and types, its templates not yet compiled.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineConfig {
    /// The input it takes besides text.
    pub input: InputConfig,
    /// Its steps in the file's order; ids are unique.
    pub steps: Vec<StepConfig>,
}

/// What a pipeline has to be given. Text, `{{ input.text }}`, may come beside audio and images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InputConfig {
    /// Text.
    pub text: bool,
    /// Audio, for `transcribe`.
    pub audio: bool,
    /// An image, for `describe`.
    pub image: bool,
}

/// One step of a pipeline. All `String`s here are templates.
#[derive(Clone, Debug, PartialEq)]
pub struct StepConfig {
    /// Its name for later steps.
    pub id: StepId,
    /// What it does.
    pub action: StepAction,
    /// The step is skipped unless this expression is true.
    pub when: Option<String>,
    /// Steps that must end first, besides those it refers to.
    pub needs: Vec<StepId>,
    /// It fails when it takes longer.
    pub timeout: Option<Duration>,
    /// How often it is tried again after a failure that may pass.
    pub retry: u32,
    /// The text that stands in for its own when it fails.
    pub fallback: Option<String>,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq)]
pub enum StepAction {
    /// Asks a model.
    Prompt {
        /// The model's name; may be a template, such as `{{ pick.model }}`.
        model: String,
        /// What is asked.
        prompt: String,
        /// Instructions above it.
        system: Option<String>,
        /// How tokens are chosen.
        sampling: Sampling,
    },
    /// Asks a model about the image that the pipeline is given.
    Describe {
        /// The model's name; may be a template.
        model: String,
        /// What is asked; a description, where it does not say.
        prompt: Option<String>,
        /// Instructions above it.
        system: Option<String>,
        /// How tokens are chosen.
        sampling: Sampling,
    },
    /// Writes down what is said in the audio that the pipeline is given.
    Transcribe {
        /// The model's name; may be a template.
        model: String,
        /// The language that is spoken, as an ISO 639-1 code; `None` leaves it to the model to find out.
        language: Option<String>,
        /// How tokens are chosen.
        sampling: Sampling,
    },
    /// Says a text again in another tone.
    Modulate {
        /// The model's name; may be a template.
        model: String,
        /// The text.
        text: String,
        /// The tone's name, such as `friendly`; may be a template.
        tone: String,
        /// How tokens are chosen; nothing in it leaves that to the tone.
        sampling: Sampling,
        /// Whether it may begin with the first sentence of a text that is still being written.
        stream: bool,
    },
    /// Asks the router. Gives `label`, `model` and `scores`.
    Route {
        /// The text to route.
        text: String,
    },
}

impl StepAction {
    /// The model that is asked, as the file has it; `None` for a route.
    #[must_use]
    pub fn model(&self) -> Option<&str> {
        match self {
            Self::Prompt { model, .. }
            | Self::Describe { model, .. }
            | Self::Transcribe { model, .. }
            | Self::Modulate { model, .. } => Some(model),
            Self::Route { .. } => None,
        }
    }
}

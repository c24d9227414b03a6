//! The shapes of the file, as serde reads them and the JSON schema describes them. Nothing is checked here but types;
//! the documentation of the fields is that of the file's keys.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::domain::{Class, HostKind, KvCacheType, ModelRole, Strategy, Weights};
use super::field::Field;
use super::values::{HostModels, Names, RawContext, Span};
use crate::answer::OnStreamFailure;
use crate::scheduler::Eviction;

/// Language models on one machine: which there are, where they run, and how much memory they may take.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawConfig {
    /// Remote hosts by name.
    pub(super) hosts: Field<BTreeMap<String, Field<RawHost>>>,
    /// Logical models by name. At least one.
    pub(super) models: Field<BTreeMap<String, Field<RawModel>>>,
    /// The memory budget and its limits.
    pub(super) memory: Field<RawMemory>,
    /// How many requests may wait, and how long.
    pub(super) queue: Field<RawQueue>,
    /// What is kept of conversations when their model is unloaded.
    pub(super) sessions: Field<RawSessions>,
    /// The Prometheus endpoint; none without it.
    pub(super) metrics: Field<RawMetrics>,
    /// Tones by name, for `modulate`. They go before the built-in ones: brief, empathetic, formal, friendly.
    pub(super) tones: Field<BTreeMap<String, Field<RawTone>>>,
    /// Pipelines by name; each here, or in a file whose path stands here, relative as models' paths are.
    #[schemars(with = "BTreeMap<String, PipelineOrFile>")]
    pub(super) pipelines: Field<BTreeMap<String, Field<RawPipeline>>>,
}

/// A pipeline as the file has it: files are read before their pipelines are.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "for the schema alone")]
enum PipelineOrFile {
    Pipeline(RawPipeline),
    File(String),
}

/// A remote host.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawHost {
    /// The protocol it speaks. Default: ollama.
    pub(super) kind: Field<HostKind>,
    /// Its address: http:// or https://, host, and port where it is not the protocol's own. No path, no user name; for kind
    /// openai, /v1 at its end is left out.
    pub(super) url: Field<String>,
    /// The name of the variable that holds the key to send, in the environment or in .env. Default: no key is sent.
    pub(super) api_key_env: Field<String>,
    /// For kind ollama: the memory that its models may take together there, in GB (10⁹ bytes). Above it, the least recently
    /// used of its idle models are unloaded, whoever loaded them. Default: no limit.
    #[schemars(range(min = 0))]
    pub(super) max_ram_gb: Field<f64>,
    /// For kind ollama: whether what it holds is looked at now and then. Default: true where it has max_ram_gb or is this
    /// machine.
    pub(super) watch: Field<bool>,
    /// How often. Default: 30s.
    pub(super) watch_interval: Field<Span>,
    /// How long a connection may take to open. Default: 1s.
    pub(super) connect_timeout: Field<Span>,
    /// How long the first token may take, the host's own queue included; where OpenAI's protocol transcribes, a second more for
    /// each 16 kB of the recording. Default: 2m.
    pub(super) first_token_timeout: Field<Span>,
    /// How much longer it may take where the host may have to load the model first. Default: 3m.
    pub(super) load_timeout: Field<Span>,
    /// How long the answer may pause between tokens. Default: 30s.
    pub(super) stall_timeout: Field<Span>,
    /// How long a whole answer may take. Default: 10m.
    pub(super) total_timeout: Field<Span>,
    /// How often a request is tried again, at once, after a failure to connect; 10 at most. Default: 1.
    #[schemars(range(max = 10))]
    pub(super) retries: Field<u32>,
    /// Requests that may run on it at once. Default: 1.
    #[schemars(range(min = 1, max = 1000))]
    pub(super) parallel: Field<usize>,
    /// For kind ollama: how long the host is asked to keep a model after a request. Default: 5m.
    pub(super) keep_alive: Field<Span>,
    /// For kind openai: whether the host goes on with a last message of the assistant's, as llama-server and vLLM do. Then it
    /// can take over an answer that another place has begun. Default: false.
    pub(super) continues: Field<bool>,
}

/// A logical model: one name, and one or more places that can serve it.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawModel {
    /// What it is for. Only LLMs count for `max_concurrent_llms`. Default: llm.
    pub(super) role: Field<ModelRole>,
    /// How hard the pool holds on to it. Default: resident for embedding models and routers, on_demand for LLMs.
    pub(super) class: Field<Class>,
    /// Where it runs. Every model needs it, except a router of kind similarity.
    pub(super) backend: Field<RawBackend>,
    /// Where it runs when its backend cannot: the other backend, another model, or a list of these in order.
    pub(super) fallback: Field<Names>,
    /// The host of backend ollama_http or openai_http, or a list of hosts in order; each request goes to the best of them.
    /// Default for ollama_http: a host `ollama` at OLLAMA_BASE_URL, or at http://127.0.0.1:11434.
    pub(super) host: Field<Names>,
    /// Its name on the hosts, or names by host. Default: SOLAR_MODEL_NAME for the model `solar`, else the model's name here.
    pub(super) host_model: Field<HostModels>,
    /// What becomes of an answer whose place fails in the middle: error, or continue on the next place. Default: error.
    pub(super) on_stream_failure: Field<OnStreamFailure>,
    /// When a host has said nothing for this long, the next place is made ready, as far as there is room. Default: never.
    pub(super) hedge_after: Field<Span>,
    /// The GGUF file of backend gguf_native, relative to this file's folder, then to the working directory. Default:
    /// models/<name>.gguf.
    pub(super) path: Field<String>,
    /// The projector (mmproj) of a GGUF file: with it the model sees images, hears audio, or both.
    pub(super) mmproj: Field<String>,
    /// The projector's memory is given back when it has had nothing to do for this long. Default: kept with the model.
    pub(super) projector_ttl: Field<Span>,
    /// The context length: auto (by free memory), a number of tokens, or bounds for auto. Default: auto.
    pub(super) context: Field<RawContext>,
    /// How the weights of a GGUF file are held. Default: auto.
    pub(super) weights: Field<Weights>,
    /// What the keys and values of a GGUF file's context are kept as: f16, or q8_0, which takes half the memory. Default: f16.
    pub(super) kv_cache_type: Field<KvCacheType>,
    /// CPU threads for a GGUF file. Default: all that the process may use.
    #[schemars(range(min = 1))]
    pub(super) threads: Field<usize>,
    /// Requests that may run at once on a GGUF file. They share its context. Default: 4 for LLMs, 16 for others.
    #[schemars(range(min = 1, max = 64))]
    pub(super) parallel: Field<usize>,
    /// LoRA adapters for a GGUF file, by path, each with its scale; 1 applies it as trained.
    pub(super) lora: Field<BTreeMap<String, Field<f64>>>,
    /// Unloaded after this long without a request. Default: kept until its memory is needed.
    pub(super) ttl: Field<Span>,
    /// For role router: how it scores texts.
    pub(super) kind: Field<RawRouterKind>,
    /// For a router of kind similarity: the embedding model.
    pub(super) model: Field<String>,
    /// For a router of kind similarity: example texts by label.
    pub(super) labels: Field<BTreeMap<String, Field<Vec<String>>>>,
    /// For role router: conditions on the scores of several labels, each with a model; the first that holds goes before routes.
    pub(super) rules: Field<Vec<Field<RawRule>>>,
    /// For role router: the model for each label. A label without one takes the default.
    pub(super) routes: Field<BTreeMap<String, Field<String>>>,
    /// For role router: the model when no label wins.
    pub(super) default: Field<String>,
    /// For role router: the score a label needs to win, from 0 to 1. Default: 0, the highest always wins.
    #[schemars(range(min = 0, max = 1))]
    pub(super) threshold: Field<f64>,
}

/// A condition on a text's scores, and the model that it leads to.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawRule {
    /// An expression over the labels' scores by their names, such as "multimodal >= 0.6" or "hard >= 0.5 and soft >= 0.5"; a name
    /// that is no word stands in scores["such a name"].
    pub(super) when: Field<String>,
    /// The model.
    pub(super) model: Field<String>,
}

/// Where a model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum RawBackend {
    /// On a remote Ollama.
    OllamaHttp,
    /// On a host that speaks OpenAI's protocol.
    OpenaiHttp,
    /// From a GGUF file, in this process.
    GgufNative,
}

/// How a router scores texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum RawRouterKind {
    /// By the likeness of their embedding to example texts.
    Similarity,
    /// By a model with a classification head.
    Classifier,
}

/// The memory budget and its limits.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawMemory {
    /// All that this process may hold for models, in GB (10⁹ bytes). Not beside a preset.
    #[schemars(range(min = 0))]
    pub(super) max_ram_gb: Field<f64>,
    /// A budget by name: low 2 GB, medium 6 GB, high 12 GB, very_high 24 GB, auto three quarters of the machine's memory or
    /// of its control group's limit. Default: medium.
    pub(super) preset: Field<Preset>,
    /// LLMs that may be loaded or loading at once, remote ones included. Default: 3.
    #[schemars(range(min = 1))]
    pub(super) max_concurrent_llms: Field<usize>,
    /// Where models run. Default: hybrid_http_gguf.
    pub(super) strategy: Field<Strategy>,
    /// Who is evicted first, within a class. Default: cost_aware.
    pub(super) eviction: Field<Eviction>,
    /// How often the machine's memory is looked at without a cause. Default: 30s.
    pub(super) monitor_interval: Field<Span>,
    /// Whether the budget is held together with all other processes of this user on this machine that say so, too.
    /// Default: false.
    pub(super) shared: Field<bool>,
    /// Whether the models that were loaded when the program ended in order are loaded again at its next start, as far as
    /// there is room. Default: false.
    pub(super) restore: Field<bool>,
}

/// A budget by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// 2 GB.
    Low,
    /// 6 GB.
    Medium,
    /// 12 GB.
    High,
    /// 24 GB.
    VeryHigh,
    /// Three quarters of the machine's memory, or of the control group's limit.
    Auto,
}

/// How many requests may wait, and how long.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawQueue {
    /// Requests that may wait at once, over all models. Default: 256.
    #[schemars(range(min = 1, max = 1000000))]
    pub(super) max_waiting: Field<usize>,
    /// How long a request waits for its model unless it says otherwise, loading included. Each place where the model
    /// can run gets an equal share of what is left. Default: 5m.
    pub(super) wait_timeout: Field<Span>,
}

/// What a local LLM has computed of a conversation (its keys and values) is written to disk when the model is unloaded or
/// needs the room, so that the conversation goes on later without reading its beginning again.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawSessions {
    /// The folder. Default: sarai/sessions in the user's cache folder.
    pub(super) path: Field<String>,
    /// How large it may grow, in GB (10⁹ bytes), the oldest going first; 0 keeps nothing. Default: 2.
    #[schemars(range(min = 0))]
    pub(super) max_gb: Field<f64>,
}

/// The Prometheus endpoint.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawMetrics {
    /// The address and port it listens on, such as 127.0.0.1:9464.
    pub(super) listen: Field<String>,
}

/// Steps that run one after another, or side by side where none needs the other.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawPipeline {
    /// What it has to be given: text, audio or image, or a list of these. Text may always come beside the others. Default: text.
    pub(super) input: Field<Names>,
    /// Its steps. At least one.
    pub(super) steps: Field<Vec<Field<RawStep>>>,
}

/// A way to say things. One of description and prompt.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawTone {
    /// How it sounds, such as "solemn, as in a speech".
    pub(super) description: Field<String>,
    /// The whole instruction to the model, in place of one made of a description.
    pub(super) prompt: Field<String>,
    /// How tokens are chosen.
    pub(super) sampling: Field<RawSampling>,
    /// Whether it needs the whole text at once, instead of sentence by sentence. Default: false.
    pub(super) whole: Field<bool>,
}

/// One step: it does exactly one of prompt, describe, transcribe, modulate and route. Texts are templates over the input and the steps
/// before, such as `{{ input.text }}` and `{{ expert.text }}`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawStep {
    /// Its name for later steps.
    pub(super) id: Field<String>,
    /// The model that is asked; may be a template, such as `{{ pick.model }}`.
    pub(super) model: Field<String>,
    /// Asks the model this.
    pub(super) prompt: Field<String>,
    /// Instructions above the prompt.
    pub(super) system: Field<String>,
    /// Says this text again in another tone.
    pub(super) modulate: Field<String>,
    /// The tone for modulate: the name of one.
    pub(super) tone: Field<String>,
    /// For modulate of another step's text: whether it begins with the first sentence, while the other step still writes.
    /// Default: true, unless the tone needs the whole text or the step has a condition.
    pub(super) stream: Field<bool>,
    /// Asks the router which model suits this text. Gives label, model and scores.
    pub(super) route: Field<String>,
    /// Writes down what is said in the audio that the pipeline is given: `{{ input.audio }}`.
    pub(super) transcribe: Field<String>,
    /// For transcribe: the language that is spoken, as an ISO 639-1 code such as es. Default: the model finds out.
    pub(super) language: Field<String>,
    /// Describes the image that the pipeline is given, `{{ input.image }}`; with a prompt, answers that about it.
    pub(super) describe: Field<String>,
    /// The step is skipped unless this expression is true.
    pub(super) when: Field<String>,
    /// Ids of steps that must end first, besides those it refers to.
    pub(super) needs: Field<Names>,
    /// The step fails when it takes longer; where it says another step's text again as that comes, each of its sentences.
    pub(super) timeout: Field<Span>,
    /// How often it is tried again after a failure that may pass, such as a host that does not answer. Default: 0.
    #[schemars(range(max = 10))]
    pub(super) retry: Field<u32>,
    /// The text that stands in for its own when it fails; not for route.
    pub(super) fallback: Field<String>,
    /// How tokens are chosen.
    pub(super) sampling: Field<RawSampling>,
}

/// How tokens are chosen, and when to stop. What is left out is the model's choice.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawSampling {
    /// Randomness; 0 always takes the likeliest token.
    #[schemars(range(min = 0))]
    pub(super) temperature: Field<f64>,
    /// Only the k likeliest tokens are considered; 0 considers all.
    pub(super) top_k: Field<u32>,
    /// Only the likeliest tokens that together reach this probability are considered.
    #[schemars(range(min = 0, max = 1))]
    pub(super) top_p: Field<f64>,
    /// Tokens below this fraction of the likeliest one's probability are left out.
    #[schemars(range(min = 0, max = 1))]
    pub(super) min_p: Field<f64>,
    /// Divides the score of tokens seen among the last 64; 1 is off.
    #[schemars(range(min = 0))]
    pub(super) repeat_penalty: Field<f64>,
    /// Taken off the score of tokens seen among the last 64, once each; 0 is off.
    #[schemars(range(min = -100, max = 100))]
    pub(super) presence_penalty: Field<f64>,
    /// Taken off the score of tokens seen among the last 64, for each time; 0 is off.
    #[schemars(range(min = -100, max = 100))]
    pub(super) frequency_penalty: Field<f64>,
    /// Makes the choice repeatable.
    pub(super) seed: Field<u32>,
    /// At most this many tokens are generated.
    #[schemars(range(min = 1))]
    pub(super) max_tokens: Field<u32>,
    /// The answer ends before any of these texts.
    pub(super) stop: Field<Names>,
}

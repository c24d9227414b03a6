//! The shapes of Ollama's native API, as far as it is used. Unknown fields are ignored, missing numbers tolerated.

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use sarai_core::request::{GenerateRequest, Message, Role, ToolCall};
use serde::{Deserialize, Serialize};

use crate::remote::{WireTool, count, size};

/// `/api/chat` or `/api/generate`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TextRequest<'a> {
    pub(super) model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) messages: Option<Vec<WireMessage<'a>>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tools: Vec<WireTool<'a>>,
    /// A JSON schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) format: Option<&'a serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) raw: Option<bool>,
    pub(super) stream: bool,
    /// Always said: a thinking model thinks unless told not to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) think: Option<bool>,
    /// Off unless asked for: a conversation that is too long is an error, not silently cut.
    pub(super) truncate: bool,
    /// Off: an answer ends with the context, and does not push the prompt out of it.
    pub(super) shift: bool,
    /// Seconds; as a number, because texts without a unit are refused.
    pub(super) keep_alive: u64,
    pub(super) options: Options<'a>,
}

/// A message as the host expects it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct WireMessage<'a> {
    role: &'static str,
    content: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WireCall<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_name: Option<&'a str>,
    /// In base64.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    images: Vec<String>,
}

impl<'a> From<&'a Message> for WireMessage<'a> {
    fn from(message: &'a Message) -> Self {
        Self {
            role: message.role.as_str(),
            content: &message.content,
            tool_calls: message.tool_calls.iter().map(|call| WireCall { function: call }).collect(),
            tool_name: message.tool_name.as_deref(),
            images: message.images.iter().map(|image| BASE64.encode(image.bytes())).collect(),
        }
    }
}

impl<'a> WireMessage<'a> {
    /// The beginning of an answer, as the last message: the model goes on with it.
    pub(super) fn said(text: &'a str) -> Self {
        Self {
            role: Role::Assistant.as_str(),
            content: text,
            tool_calls: Vec::new(),
            tool_name: None,
            images: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
struct WireCall<'a> {
    function: &'a ToolCall,
}

/// `/api/generate` without a prompt: loads the model, or with 0 seconds unloads it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ResidencyRequest<'a> {
    pub(super) model: &'a str,
    pub(super) keep_alive: u64,
    pub(super) stream: bool,
    pub(super) options: Options<'a>,
}

/// `/api/embed`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct EmbedRequest<'a> {
    pub(super) model: &'a str,
    pub(super) input: &'a [String],
    /// Off: a text that is too long is an error, not silently cut.
    pub(super) truncate: bool,
    pub(super) keep_alive: u64,
    pub(super) options: Options<'a>,
}

/// Runner and sampling options; only those that are set are sent.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Options<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    num_ctx: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    num_predict: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repeat_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u32>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    stop: &'a [String],
}

impl<'a> Options<'a> {
    /// The context length alone. The same for every request of a model: another one makes the host load it anew.
    pub(super) fn context(num_ctx: Option<u32>) -> Self {
        Self { num_ctx, ..Self::default() }
    }

    pub(super) fn sampling(num_ctx: Option<u32>, request: &'a GenerateRequest) -> Self {
        let sampling = &request.sampling;
        let said = request.prefill.as_ref().map_or(0, |prefill| prefill.tokens);
        Self {
            num_ctx,
            num_predict: sampling.max_tokens.map(|most| most.saturating_sub(said)),
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repeat_penalty: sampling.repeat_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed,
            stop: &sampling.stop,
        }
    }
}

/// A line of an answer's stream.
#[derive(Debug, Deserialize)]
pub(super) struct Line {
    pub(super) error: Option<String>,
    pub(super) message: Option<LineMessage>,
    pub(super) response: Option<String>,
    #[serde(default)]
    pub(super) done: bool,
    pub(super) done_reason: Option<String>,
    #[serde(default, deserialize_with = "count")]
    pub(super) prompt_eval_count: Option<u32>,
    #[serde(default, deserialize_with = "count")]
    pub(super) eval_count: Option<u32>,
    /// Nanoseconds.
    #[serde(default, deserialize_with = "count")]
    pub(super) eval_duration: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct LineMessage {
    #[serde(default)]
    pub(super) content: String,
    #[serde(default)]
    pub(super) tool_calls: Vec<LineCall>,
}

#[derive(Debug, Deserialize)]
pub(super) struct LineCall {
    pub(super) function: ToolCall,
}

/// The body of an error.
#[derive(Debug, Deserialize)]
pub(super) struct ErrorBody {
    pub(super) error: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct EmbedAnswer {
    pub(super) embeddings: Vec<Vec<f32>>,
    #[serde(default, deserialize_with = "count")]
    pub(super) prompt_eval_count: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Version {
    pub(super) version: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Tags {
    #[serde(default)]
    pub(super) models: Vec<Tag>,
}

/// A model that a host has on disk.
#[derive(Debug, Deserialize)]
pub(super) struct Tag {
    pub(super) name: String,
    #[serde(default, deserialize_with = "size")]
    pub(super) size: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct Processes {
    #[serde(default)]
    pub(super) models: Vec<HostModel>,
}

/// A model that a host holds in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostModel {
    /// Its name there, with its tag.
    pub name: String,
    /// Bytes it holds there, as the host says.
    #[serde(default, deserialize_with = "size")]
    pub size: u64,
    /// Bytes of these on a GPU.
    #[serde(default, deserialize_with = "size")]
    pub size_vram: u64,
    /// When the host will drop it, as it says.
    #[serde(default)]
    pub expires_at: Option<String>,
    /// Its context length in tokens.
    #[serde(default, deserialize_with = "count")]
    pub context_length: Option<u32>,
}

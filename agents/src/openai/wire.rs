//! The shapes of OpenAI's API, as far as it is used. Unknown fields are ignored, missing numbers tolerated.

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use sarai_core::audio::Audio;
use sarai_core::image::Image;
use sarai_core::request::{GenerateRequest, Message, Role, ToolCall};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::remote::{WireTool, count, or_default};

/// `/v1/chat/completions` or `/v1/completions`. Only what is set is sent: some hosts refuse what they do not know.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TextRequest<'a> {
    pub(super) model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) messages: Option<Vec<WireMessage<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tools: Vec<WireTool<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) response_format: Option<Value>,
    pub(super) stream: bool,
    pub(super) stream_options: StreamOptions,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    /// No part of OpenAI's own, but of llama-server's, vLLM's and LM Studio's; so are the next two.
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
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
    /// Has vLLM go on with the last message; llama-server does so by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) continue_final_message: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) add_generation_prompt: Option<bool>,
}

/// Asks for the counts of tokens at the end of a stream.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct StreamOptions {
    include_usage: bool,
}

impl<'a> TextRequest<'a> {
    /// A request with its sampling, and nothing to continue yet.
    pub(super) fn sampling(model: &'a str, request: &'a GenerateRequest) -> Self {
        let sampling = &request.sampling;
        let said = request.prefill.as_ref().map_or(0, |prefill| prefill.tokens);
        Self {
            model,
            messages: None,
            prompt: None,
            tools: request.tools.iter().map(Into::into).collect(),
            response_format: None,
            stream: true,
            stream_options: StreamOptions { include_usage: true },
            max_tokens: sampling.max_tokens.map(|most| most.saturating_sub(said)),
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repeat_penalty: sampling.repeat_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed,
            stop: &sampling.stop,
            continue_final_message: None,
            add_generation_prompt: None,
        }
    }
}

/// An answer that is valid under a schema.
pub(super) fn schema_format(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "answer", "strict": true, "schema": schema}})
}

/// The answer of `/v1/audio/transcriptions`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Transcript {
    pub(super) text: String,
}

/// A message as the host expects it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct WireMessage<'a> {
    role: &'static str,
    content: Content<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<String>,
}

/// Text alone, or parts.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Text(&'a str),
    Parts(Vec<Value>),
}

impl<'a> From<&'a Message> for Content<'a> {
    fn from(message: &'a Message) -> Self {
        if message.images.is_empty() && message.audio.is_empty() {
            return Self::Text(&message.content);
        }
        let text = json!({"type": "text", "text": message.content});
        let image = |image: &Image| {
            let url = format!("data:{};base64,{}", image.media_type(), BASE64.encode(image.bytes()));
            json!({"type": "image_url", "image_url": {"url": url}})
        };
        let audio = |audio: &Audio| {
            let (data, format) = (BASE64.encode(audio.bytes()), audio.extension());
            json!({"type": "input_audio", "input_audio": {"data": data, "format": format}})
        };
        // The question after what it is about.
        let media = message.images.iter().map(image).chain(message.audio.iter().map(audio));
        Self::Parts(media.chain([text]).collect())
    }
}

/// A conversation as the host expects it. The protocol tells calls and their results apart by ids, which ours have not: they
/// are numbered in their order, and results answer calls in turn.
pub(super) fn messages<'a>(messages: &'a [Message], said: &'a str) -> Vec<WireMessage<'a>> {
    let (mut called, mut answered) = (0, 0);
    let id = |n: usize| format!("call_{n:05}");
    let mut wire: Vec<WireMessage<'a>> = messages
        .iter()
        .map(|message| {
            let calls = message.tool_calls.iter().map(|call| {
                called += 1;
                let arguments = Value::Object(call.arguments.clone()).to_string();
                let function = json!({"name": call.name, "arguments": arguments});
                json!({"id": id(called), "type": "function", "function": function})
            });
            let tool_calls = calls.collect();
            let tool_call_id = (message.role == Role::Tool).then(|| {
                answered += 1;
                id(answered)
            });
            WireMessage { role: message.role.as_str(), content: message.into(), tool_calls, tool_call_id }
        })
        .collect();
    if !said.is_empty() {
        let role = Role::Assistant.as_str();
        wire.push(WireMessage {
            role,
            content: Content::Text(said),
            tool_calls: Vec::new(),
            tool_call_id: None,
        });
    }
    wire
}

/// `/v1/embeddings`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct EmbedRequest<'a> {
    pub(super) model: &'a str,
    pub(super) input: &'a [String],
    pub(super) encoding_format: &'static str,
}

/// An event of an answer's stream.
#[derive(Debug, Deserialize)]
pub(super) struct Chunk {
    pub(super) error: Option<Value>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) choices: Vec<Choice>,
    pub(super) usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Choice {
    pub(super) delta: Option<ChunkDelta>,
    /// Of `/v1/completions`.
    pub(super) text: Option<String>,
    pub(super) finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ChunkDelta {
    pub(super) content: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) tool_calls: Vec<CallPart>,
}

/// A part of a call: the name comes first, the arguments in pieces.
#[derive(Debug, Deserialize)]
pub(super) struct CallPart {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) index: usize,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) function: FunctionPart,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct FunctionPart {
    pub(super) name: Option<String>,
    pub(super) arguments: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Usage {
    #[serde(default, deserialize_with = "count")]
    pub(super) prompt_tokens: Option<u32>,
    #[serde(default, deserialize_with = "count")]
    pub(super) completion_tokens: Option<u32>,
    pub(super) prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Deserialize)]
pub(super) struct PromptDetails {
    #[serde(default, deserialize_with = "count")]
    pub(super) cached_tokens: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct EmbedAnswer {
    pub(super) data: Vec<Embedded>,
    pub(super) usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Embedded {
    pub(super) index: Option<usize>,
    pub(super) embedding: Vec<f32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Models {
    pub(super) data: Vec<ListedModel>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ListedModel {
    pub(super) id: String,
}

/// What a body says of an error: a text, or an object with one, by itself or below `error`; FastAPI's servers say `detail`.
pub(super) fn error_text(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let error =
        [&body["error"], &body["detail"], &body["message"]].into_iter().find(|value| !value.is_null())?;
    Some(said(error))
}

/// An error's own words.
pub(super) fn said(error: &Value) -> String {
    match (error, &error["message"]) {
        (Value::String(text), _) | (_, Value::String(text)) => text.clone(),
        (other, _) => other.to_string(),
    }
}

/// A call whose parts have all come. Arguments that are no JSON object are the host's fault.
pub(super) fn tool_call(name: String, arguments: &str) -> Result<ToolCall, String> {
    let arguments = if arguments.trim().is_empty() { "{}" } else { arguments };
    match serde_json::from_str(arguments) {
        Ok(arguments) => Ok(ToolCall { name, arguments }),
        Err(error) => Err(format!("the arguments of its call of {name:?} are no JSON object: {error}")),
    }
}

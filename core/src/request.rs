//! What is asked of a model, and what it answers: plain data, the same for every backend.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::audio::Audio;
use crate::failure::Failure;
use crate::image::Image;

/// Something a model can be asked for. A backend states which it has; asking for another is an error before anything
/// is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Capability {
    /// Text from messages or a prompt.
    Generate,
    /// A vector per text.
    Embed,
    /// A score per label of a classification head.
    Classify,
    /// A score per document: how well it answers a query.
    Rerank,
    /// Text from messages with images beside them.
    See,
    /// Text from messages with audio beside them.
    Hear,
    /// The text of what is said in audio.
    Transcribe,
}

impl Capability {
    /// All there are.
    pub const ALL: [Self; 7] =
        [Self::Generate, Self::Embed, Self::Classify, Self::Rerank, Self::See, Self::Hear, Self::Transcribe];
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Generate => "generate",
            Self::Embed => "embed",
            Self::Classify => "classify",
            Self::Rerank => "rerank",
            Self::See => "see images",
            Self::Hear => "hear audio",
            Self::Transcribe => "transcribe audio",
        })
    }
}

/// A set of [`Capability`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u8);

impl Capabilities {
    /// The set of `all`.
    #[must_use]
    pub const fn of(all: &[Capability]) -> Self {
        let mut set = 0;
        let mut i = 0;
        while i < all.len() {
            set |= 1 << all[i] as u8;
            i += 1;
        }
        Self(set)
    }

    /// The same set with `one` in it.
    #[must_use]
    pub const fn with(self, one: Capability) -> Self {
        Self(self.0 | 1 << one as u8)
    }

    /// Whether `one` is in the set.
    #[must_use]
    pub const fn has(self, one: Capability) -> bool {
        self.0 & (1 << one as u8) != 0
    }
}

/// Who speaks in a [`Message`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The instructions above the conversation.
    System,
    /// The person, or the program, that asks.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called: its result.
    Tool,
}

impl Role {
    /// The role's name, as chat templates and chat APIs spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// The calls that the model made in this message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// For a tool's result: the tool's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_name: Option<String>,
    /// What is shown beside it; before its text, in this order.
    #[serde(skip)]
    pub images: Vec<Image>,
    /// What is heard beside it; after its images and before its text, in this order.
    #[serde(skip)]
    pub audio: Vec<Audio>,
}

impl Message {
    fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            tool_calls: Vec::new(),
            tool_name: None,
            images: Vec::new(),
            audio: Vec::new(),
        }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// Instructions to the model.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// An earlier answer of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// The result of a tool that the model called.
    pub fn tool(name: impl Into<String>, content: impl Into<String>) -> Self {
        Self { tool_name: Some(name.into()), ..Self::new(Role::Tool, content) }
    }

    /// The same message with images beside it.
    #[must_use]
    pub fn with_images(mut self, images: Vec<Image>) -> Self {
        self.images = images;
        self
    }

    /// The same message with audio beside it.
    #[must_use]
    pub fn with_audio(mut self, audio: Vec<Audio>) -> Self {
        self.audio = audio;
        self
    }

    /// The same message with the calls that the model made in it.
    #[must_use]
    pub fn with_tool_calls(mut self, tool_calls: Vec<ToolCall>) -> Self {
        self.tool_calls = tool_calls;
        self
    }
}

/// A function that a model may call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does, for the model to read.
    #[serde(default)]
    pub description: String,
    /// A JSON schema of its arguments, an object.
    pub parameters: serde_json::Value,
}

/// A model's call of a [`Tool`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The tool's name, as the model wrote it.
    pub name: String,
    /// The arguments by name, as the model wrote them; not checked against the tool's schema.
    pub arguments: serde_json::Map<String, serde_json::Value>,
}

/// The most alternatives to each token that a request may ask for, as with OpenAI's and Ollama's own interfaces.
pub const MOST_LOGPROBS: u32 = 20;

/// What an answer has to look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constraint {
    /// JSON that is valid under this JSON schema.
    JsonSchema(serde_json::Value),
    /// Text of a grammar in llama.cpp's GBNF, from the rule `root`.
    Grammar(String),
}

/// What is done with a conversation that is longer than the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncate {
    /// The request fails with [`FailureKind::ContextOverflow`](crate::failure::FailureKind::ContextOverflow).
    #[default]
    Error,
    /// The oldest turns are left out until the rest fits, and no more of them; then what followed first on the last
    /// question. Instructions and that question stay. Of a raw prompt, its beginning is left out. The answer says so.
    Oldest,
}

/// What a model continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, put into the model's own chat template.
    Chat(Vec<Message>),
    /// Text as it is, without a template.
    Raw(String),
}

/// How the next token is chosen, and when to stop. `None` leaves the choice to the model's defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Randomness; 0 always takes the likeliest token.
    pub temperature: Option<f32>,
    /// Only the k likeliest tokens are considered.
    pub top_k: Option<u32>,
    /// Only the likeliest tokens that together reach this probability are considered.
    pub top_p: Option<f32>,
    /// Tokens below this fraction of the likeliest one's probability are left out.
    pub min_p: Option<f32>,
    /// Divides the score of tokens seen among the last 64; 1 is off.
    pub repeat_penalty: Option<f32>,
    /// Taken off the score of tokens seen among the last 64, once each; 0 is off.
    pub presence_penalty: Option<f32>,
    /// Taken off the score of tokens seen among the last 64, for each time; 0 is off.
    pub frequency_penalty: Option<f32>,
    /// Makes the choice repeatable.
    pub seed: Option<u32>,
    /// At most this many tokens are generated.
    pub max_tokens: Option<u32>,
    /// The answer ends before any of these texts.
    pub stop: Vec<String>,
}

impl Sampling {
    /// What in it is no possible value, if anything.
    #[must_use]
    pub fn problem(&self) -> Option<&'static str> {
        let off = |value: Option<f32>, least: f32, most: f32| {
            value.is_some_and(|value| !value.is_finite() || !(least..=most).contains(&value))
        };
        match () {
            () if off(self.temperature, 0.0, f32::MAX) => Some("temperature has to be a number, 0 or more"),
            () if off(self.top_p, 0.0, 1.0) => Some("top_p has to be from 0 to 1"),
            () if off(self.min_p, 0.0, 1.0) => Some("min_p has to be from 0 to 1"),
            () if off(self.repeat_penalty, f32::MIN_POSITIVE, f32::MAX) => {
                Some("repeat_penalty has to be a number above 0")
            }
            () if off(self.presence_penalty, f32::MIN, f32::MAX) => {
                Some("presence_penalty has to be a number")
            }
            () if off(self.frequency_penalty, f32::MIN, f32::MAX) => {
                Some("frequency_penalty has to be a number")
            }
            () => None,
        }
    }
}

/// A request for text.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// How.
    pub sampling: Sampling,
    /// Functions that the model may call. What it calls comes with the end of its answer.
    pub tools: Vec<Tool>,
    /// What the answer has to look like, where that is not free. Not beside tools.
    pub constraint: Option<Constraint>,
    /// What is done with a prompt that is too long.
    pub truncate: Truncate,
    /// Asks for each token's probability, and for those of this many likeliest ones beside it, [`MOST_LOGPROBS`] at most.
    pub logprobs: Option<u32>,
    /// Added to the scores of tokens, by their numbers in the model's vocabulary, before a token is chosen; minus
    /// infinity keeps a token out.
    pub logit_bias: BTreeMap<u32, f32>,
    /// The beginning of the answer, where there is one already.
    pub prefill: Option<Prefill>,
}

/// The beginning of an answer. The model goes on from there and does not say it again; for stop texts, the limit of tokens
/// and the answer's form it counts as if the model had said it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefill {
    /// The text.
    pub text: String,
    /// How many tokens it has, for a host, which cannot be asked; a model in this process counts them itself.
    pub tokens: u32,
}

impl GenerateRequest {
    fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            sampling: Sampling::default(),
            tools: Vec::new(),
            constraint: None,
            truncate: Truncate::default(),
            logprobs: None,
            logit_bias: BTreeMap::new(),
            prefill: None,
        }
    }

    /// A number that the turns of one conversation have in common: that of its beginning, up to the first question. `None`
    /// for a conversation that has had no answer yet, and for a raw prompt.
    #[must_use]
    pub fn conversation(&self) -> Option<u64> {
        let Prompt::Chat(messages) = &self.prompt else { return None };
        messages.iter().any(|message| message.role == Role::Assistant).then(|| beginning(messages))
    }

    /// The number that [`conversation`](Self::conversation) will give once there is an answer.
    #[must_use]
    pub fn begins_conversation(&self) -> Option<u64> {
        let Prompt::Chat(messages) = &self.prompt else { return None };
        Some(beginning(messages))
    }

    /// A chat request with default sampling.
    #[must_use]
    pub fn chat(messages: Vec<Message>) -> Self {
        Self::new(Prompt::Chat(messages))
    }

    /// A request that continues `text` as it is, with default sampling.
    pub fn raw(text: impl Into<String>) -> Self {
        Self::new(Prompt::Raw(text.into()))
    }

    /// Whether a model has to see to answer it.
    #[must_use]
    pub fn has_images(&self) -> bool {
        self.messages().iter().any(|message| !message.images.is_empty())
    }

    /// Whether a model has to hear to answer it.
    #[must_use]
    pub fn has_audio(&self) -> bool {
        self.messages().iter().any(|message| !message.audio.is_empty())
    }

    /// What a model must be able to do to answer it. One with images and audio gives [`Capability::Hear`]: a model that
    /// hears and does not see refuses it.
    #[must_use]
    pub fn capability(&self) -> Capability {
        match (self.has_audio(), self.has_images()) {
            (true, _) => Capability::Hear,
            (false, true) => Capability::See,
            (false, false) => Capability::Generate,
        }
    }

    fn messages(&self) -> &[Message] {
        match &self.prompt {
            Prompt::Chat(messages) => messages,
            Prompt::Raw(_) => &[],
        }
    }

    /// What in it is no possible value or does not go together, if anything: a backend refuses it rather than leave a part
    /// out.
    #[must_use]
    pub fn contradiction(&self) -> Option<&'static str> {
        if let Some(problem) = self.sampling.problem() {
            return Some(problem);
        }
        if self.logprobs.is_some_and(|alternatives| alternatives > MOST_LOGPROBS) {
            return Some("a request may ask for 20 alternatives to each token at most (logprobs)");
        }
        if self.logit_bias.values().any(|bias| bias.is_nan() || *bias == f32::INFINITY) {
            return Some("a logit bias has to be a number, or minus infinity");
        }
        if self.tools.is_empty() {
            return None;
        }
        if self.prefill.is_some() {
            return Some("an answer that has begun already cannot call tools");
        }
        match (&self.prompt, &self.constraint) {
            (Prompt::Raw(_), _) => Some("tools need a conversation: a raw prompt has no place for them"),
            (_, Some(_)) => Some("an answer can either call tools or have a fixed form"),
            (Prompt::Chat(_), None) => None,
        }
    }

    /// The same request with functions that the model may call.
    #[must_use]
    pub fn with_tools(mut self, tools: Vec<Tool>) -> Self {
        self.tools = tools;
        self
    }

    /// The same request with a form that its answer has to have.
    #[must_use]
    pub fn with_constraint(mut self, constraint: Constraint) -> Self {
        self.constraint = Some(constraint);
        self
    }

    /// The same request with a rule for prompts that are too long.
    #[must_use]
    pub fn with_truncate(mut self, truncate: Truncate) -> Self {
        self.truncate = truncate;
        self
    }

    /// The same request, asking for the tokens' probabilities and those of so many alternatives.
    #[must_use]
    pub fn with_logprobs(mut self, alternatives: u32) -> Self {
        self.logprobs = Some(alternatives);
        self
    }

    /// The same request with this added to the scores of tokens, by their numbers in the model's vocabulary.
    #[must_use]
    pub fn with_logit_bias(mut self, bias: impl IntoIterator<Item = (u32, f32)>) -> Self {
        self.logit_bias = bias.into_iter().collect();
        self
    }

    /// The same request, its answer beginning with this.
    #[must_use]
    pub fn with_prefill(mut self, prefill: Prefill) -> Self {
        self.prefill = Some(prefill);
        self
    }

    /// The same request with `sampling`.
    #[must_use]
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }
}

/// A request for the text of what is said in audio.
#[derive(Clone, Debug, PartialEq)]
pub struct TranscribeRequest {
    /// What is heard.
    pub audio: Audio,
    /// The language that is spoken, as an ISO 639-1 code such as `es`; `None` leaves it to the model to find out.
    pub language: Option<String>,
    /// What the model is told beside it: for one that converses, in place of its usual instruction; for one that only
    /// transcribes, words that are likely to occur.
    pub prompt: Option<String>,
    /// How tokens are chosen; without a temperature, always the likeliest. Its limit of tokens is for each part of a long
    /// recording.
    pub sampling: Sampling,
}

impl TranscribeRequest {
    /// A request with everything left to the model.
    #[must_use]
    pub fn new(audio: Audio) -> Self {
        Self { audio, language: None, prompt: None, sampling: Sampling::default() }
    }

    /// The same request, for this language.
    #[must_use]
    pub fn with_language(mut self, language: impl Into<String>) -> Self {
        self.language = Some(language.into());
        self
    }

    /// The same request with these words to the model.
    #[must_use]
    pub fn with_prompt(mut self, prompt: impl Into<String>) -> Self {
        self.prompt = Some(prompt.into());
        self
    }

    /// The same request with `sampling`.
    #[must_use]
    pub fn with_sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }
}

/// A number for the messages up to the first of the user's. Not the same in every build: for this process alone.
fn beginning(messages: &[Message]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for message in messages {
        (message.role.as_str(), &message.content).hash(&mut hasher);
        message.images.iter().for_each(|image| image.bytes().hash(&mut hasher));
        message.audio.iter().for_each(|audio| audio.bytes().hash(&mut hasher));
        if message.role == Role::User {
            break;
        }
    }
    hasher.finish()
}

/// Why a model stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// It ended its answer, or a stop text came up.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
    /// It called tools.
    ToolCalls,
}

/// A token of an answer and its probability before sampling.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token's text; U+FFFD stands for a part of a character.
    pub token: String,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens at this place, likeliest first.
    pub top: Vec<Alternative>,
}

/// A token that could have been chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alternative {
    /// Its text.
    pub token: String,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

/// What a backend knows at the end of a generation. Fields that it does not report are `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Why it stopped.
    pub finish_reason: FinishReason,
    /// Whether the prompt was cut to fit the context.
    pub truncated: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u32>,
    /// Those of them that had been computed for an earlier request and were not computed again.
    pub cached_tokens: Option<u32>,
    /// Tokens of the answer.
    pub completion_tokens: Option<u32>,
    /// Time spent on generating the answer's tokens, as the backend measured it: the mean time between two tokens,
    /// times their number.
    pub decode_time: Option<Duration>,
    /// The tools that the model called, in its order.
    pub tool_calls: Vec<ToolCall>,
    /// Each token's probability, where the request asked for them and the backend has them.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

impl Completion {
    /// A completion of which nothing is known but why it ended.
    #[must_use]
    pub const fn new(finish_reason: FinishReason) -> Self {
        Self {
            finish_reason,
            truncated: false,
            prompt_tokens: None,
            cached_tokens: None,
            completion_tokens: None,
            decode_time: None,
            tool_calls: Vec::new(),
            logprobs: None,
        }
    }
}

/// An item of a [`TokenStream`].
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// A piece of the answer; never empty, never a part of a character.
    Text(String),
    /// The end; nothing follows.
    Done(Completion),
}

/// A model's answer as it comes: any number of [`Delta::Text`], then exactly one [`Delta::Done`] or one error.
/// A stream that ends without either broke its contract and is treated as cut off. Dropping it stops the work.
pub type TokenStream = Pin<Box<dyn Stream<Item = Result<Delta, Failure>> + Send>>;

/// The vectors of an embedding request: one per text, in the texts' order, of length 1 each.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// One vector per text.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of all texts together, where the backend reports them.
    pub prompt_tokens: Option<u32>,
}

impl Embeddings {
    /// Brings every vector to length 1; one that is all zeros stays so.
    #[must_use]
    pub fn normalised(mut vectors: Vec<Vec<f32>>, prompt_tokens: Option<u32>) -> Self {
        for vector in &mut vectors {
            let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
            if length > 0.0 {
                vector.iter_mut().for_each(|x| *x /= length);
            }
        }
        Self { vectors, prompt_tokens }
    }
}

/// A label and its score.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LabelScore {
    /// The label.
    pub label: String,
    /// From 0 to 1.
    pub score: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_no_token_can_be_chosen_by_are_refused() {
        let refused = |sampling: Sampling| GenerateRequest::raw("x").with_sampling(sampling).contradiction();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5] {
            let all = [
                Sampling { temperature: Some(bad), ..Sampling::default() },
                Sampling { top_p: Some(bad), ..Sampling::default() },
                Sampling { min_p: Some(bad), ..Sampling::default() },
                Sampling { repeat_penalty: Some(bad), ..Sampling::default() },
            ];
            assert!(all.into_iter().all(|sampling| refused(sampling).is_some()), "{bad}");
        }
        for penalty in [Some(f32::NAN), Some(f32::INFINITY)] {
            assert!(refused(Sampling { presence_penalty: penalty, ..Sampling::default() }).is_some());
            assert!(refused(Sampling { frequency_penalty: penalty, ..Sampling::default() }).is_some());
        }
        assert!(refused(Sampling { top_p: Some(1.5), ..Sampling::default() }).is_some());
        assert!(refused(Sampling { repeat_penalty: Some(0.0), ..Sampling::default() }).is_some());
        let edges = Sampling {
            temperature: Some(0.0),
            top_p: Some(1.0),
            min_p: Some(0.0),
            repeat_penalty: Some(0.5),
            presence_penalty: Some(-2.0),
            frequency_penalty: Some(-2.0),
            ..Sampling::default()
        };
        assert_eq!(refused(edges), None);
    }

    #[test]
    fn no_more_alternatives_than_the_most_can_be_asked_for() {
        let asked = |alternatives| GenerateRequest::raw("x").with_logprobs(alternatives).contradiction();
        assert_eq!(asked(MOST_LOGPROBS), None);
        assert!(asked(MOST_LOGPROBS + 1).unwrap().contains(&MOST_LOGPROBS.to_string()));
    }

    #[test]
    fn vectors_get_length_one_and_nothing_stays_nothing() {
        let embeddings = Embeddings::normalised(vec![vec![3.0, 4.0], vec![0.0, 0.0]], None);
        assert_eq!(embeddings.vectors, [[0.6, 0.8], [0.0, 0.0]]);
    }
}

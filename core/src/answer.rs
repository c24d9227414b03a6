//! What a caller of the pool gets: text as it comes, and at the end who served it, why, and what it took.

use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use futures::Stream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::ServedBy;
use crate::error::Error;
use crate::request::{
    Embeddings, FinishReason, GenerateRequest, LabelScore, TokenLogprob, ToolCall, TranscribeRequest,
};
use crate::units::ModelName;

/// How urgent a request is. Requests that wait longer move up, a class at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Work nobody waits for.
    Background,
    /// The default.
    #[default]
    Normal,
    /// Someone is watching the cursor.
    Interactive,
}

/// How a request is to be treated by the pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallOptions {
    /// Its place among the waiting.
    pub priority: Priority,
    /// How long it may wait for its model, queueing and loading together; `None` takes the pool's default.
    pub wait_timeout: Option<Duration>,
    /// What becomes of an answer whose place fails in the middle; `None` takes the model's own way.
    pub on_stream_failure: Option<OnStreamFailure>,
}

/// What becomes of an answer whose place fails after its first text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnStreamFailure {
    /// It ends with an error.
    #[default]
    Error,
    /// The next place takes the text so far as the beginning of its own answer and goes on. The answer says where. One that
    /// may call tools ends with an error all the same.
    Continue,
}

/// Who served a request, and the time it took to get there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Provenance {
    /// The backend, with its host or file.
    pub served_by: ServedBy,
    /// Why the model's first choice did not answer, where it did not.
    pub fallback_reason: Option<String>,
    /// Milliseconds between the request and its turn on a ready model, loading excepted.
    pub queue_ms: u64,
    /// Milliseconds of that spent on loading the model.
    pub load_ms: u64,
    /// The model's context length in tokens, where it is known.
    pub n_ctx: Option<u32>,
}

/// The terminal event of an answer: all there is to say about it besides its text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// Who served it.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Why the model stopped.
    pub finish_reason: FinishReason,
    /// Whether the prompt was cut to fit.
    pub truncated: bool,
    /// Tokens of the prompt, where the backend reports them.
    pub prompt_tokens: Option<u32>,
    /// Those of them that had been computed for an earlier request, where the backend reports them.
    pub cached_tokens: Option<u32>,
    /// Tokens of the answer, where the backend reports them.
    pub completion_tokens: Option<u32>,
    /// Milliseconds from the model's readiness to the first text; `None` if there was no text.
    pub ttft_ms: Option<u64>,
    /// Tokens of the answer per second of generation, where both are known.
    pub tokens_per_second: Option<f64>,
    /// The tools that the model called, in its order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Each token's probability, where the request asked for them and the backend has them; of an answer that went on
    /// elsewhere, those of its last part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// Where the answer went on elsewhere, because its place failed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub handovers: Vec<Handover>,
}

/// A place failed in the middle of an answer, and another one went on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Handover {
    /// Characters of the answer that had been said.
    pub at: usize,
    /// Who had said them.
    pub from: ServedBy,
    /// Who went on.
    pub to: ServedBy,
    /// Why.
    pub reason: String,
}

/// An item of an [`AnswerStream`].
#[derive(Clone, Debug, PartialEq)]
pub enum AnswerEvent {
    /// A piece of the answer.
    Text(String),
    /// The end; nothing follows.
    Done(Answer),
}

/// An answer as it comes: any number of [`AnswerEvent::Text`], then exactly one [`AnswerEvent::Done`] or one error.
/// Dropping it stops the work and frees the request's place.
pub type AnswerStream = Pin<Box<dyn Stream<Item = Result<AnswerEvent, Error>> + Send>>;

/// What pipelines and routers need of the pool: requests by model name.
#[async_trait]
pub trait Models: Send + Sync + 'static {
    /// Continues a prompt.
    ///
    /// # Errors
    /// The model is unknown, cannot do it, cannot be loaded in time and budget, or fails before its first text with
    /// no fallback left.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future, or later the stream, ends the request.
    async fn generate(
        &self,
        model: &ModelName,
        request: GenerateRequest,
        options: CallOptions,
    ) -> Result<AnswerStream, Error>;

    /// Writes down what is said in audio.
    ///
    /// # Errors
    /// As for [`Models::generate`]; the audio cannot be read, or there is nothing in it to transcribe.
    ///
    /// # Cancel safety
    /// As for [`Models::generate`].
    async fn transcribe(
        &self,
        model: &ModelName,
        request: TranscribeRequest,
        options: CallOptions,
    ) -> Result<AnswerStream, Error>;

    /// Whether a model can ever be ready within the budget, whatever is evicted for it. Nothing is loaded.
    ///
    /// # Errors
    /// It is unknown, or none of its places can ever fit ([`Error::OverBudget`], with the numbers). What else may go wrong
    /// with a place, its use will tell.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn can_fit(&self, model: &ModelName) -> Result<(), Error>;

    /// Makes a model ready that is likely to be asked soon, as far as there is room: nothing is evicted for it that was
    /// used within the last minute, and a failure goes to the log alone.
    ///
    /// # Cancel safety
    /// Cancel safe: a load that nobody else waits for is given up.
    async fn prepare(&self, model: &ModelName);

    /// Embeds texts.
    ///
    /// # Errors
    /// As for [`Models::generate`].
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future ends the request.
    async fn embed(
        &self,
        model: &ModelName,
        texts: Vec<String>,
        options: CallOptions,
    ) -> Result<(Embeddings, Provenance), Error>;

    /// Scores a text for the labels of a model's classification head, highest first.
    ///
    /// # Errors
    /// As for [`Models::generate`].
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future ends the request.
    async fn classify(
        &self,
        model: &ModelName,
        text: String,
        options: CallOptions,
    ) -> Result<(Vec<LabelScore>, Provenance), Error>;
}

use serde::Serialize;

use crate::answer::Answer;
use crate::request::LabelScore;
use crate::units::{ModelName, PipelineName, StepId};

/// Something that happened in a run.
#[derive(Clone, Debug)]
pub enum PipelineEvent {
    /// A step's model is asked for the first time. `model` is none for routing.
    StepStarted {
        /// The step.
        step: StepId,
        /// The model it asks.
        model: Option<ModelName>,
    },
    /// A step failed in a way that may pass, and is tried again. What it has said so far is void. So is what steps have said
    /// that take its text as it comes: each of them says so itself.
    StepRetried {
        /// The step.
        step: StepId,
        /// Which attempt begins: 2 for the first retry.
        attempt: u32,
        /// What failed.
        error: String,
    },
    /// A step's model said something.
    StepText {
        /// The step.
        step: StepId,
        /// The piece of text.
        text: String,
    },
    /// A step ended, was skipped, or failed and has a fallback.
    StepDone(Box<StepReport>),
    /// All steps ended; nothing follows.
    Done(PipelineReport),
}

/// What became of a step.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// The step.
    pub id: StepId,
    /// `prompt`, `describe`, `transcribe`, `modulate` or `route`.
    pub kind: &'static str,
    /// The model that was asked, or that a route leads to.
    pub model: Option<ModelName>,
    /// Its text; empty for a route and where it was skipped.
    pub text: String,
    /// Whether its condition was false.
    pub skipped: bool,
    /// Why it failed, where its fallback stands in for it.
    pub error: Option<String>,
    /// Who answered, and how long that took.
    #[serde(flatten)]
    pub answer: Option<Answer>,
    /// For a route: the label that won, the scores and the reason.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub routing: Option<RouteReport>,
    /// How often it was tried.
    pub attempts: u32,
    /// Milliseconds from the run's start to its own.
    pub started_ms: u64,
    /// Milliseconds from the run's start to its first text; `None` where it said nothing.
    pub first_text_ms: Option<u64>,
    /// Milliseconds from its start to its end.
    pub duration_ms: u64,
}

/// What a route found.
#[derive(Clone, Debug, Serialize)]
pub struct RouteReport {
    /// The label that won.
    pub label: Option<String>,
    /// The router's rule that held, where one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// All labels, highest score first.
    pub scores: Vec<LabelScore>,
    /// Why this model.
    pub reason: String,
}

/// What became of a run.
#[derive(Clone, Debug, Serialize)]
pub struct PipelineReport {
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The text of the last step that has one, in the file's order.
    pub text: String,
    /// All steps in the file's order.
    pub steps: Vec<StepReport>,
    /// Milliseconds from the run's start to its end.
    pub total_ms: u64,
}

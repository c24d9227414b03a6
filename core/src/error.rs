//! The pool's one error type. Errors carry the numbers a caller needs to act on them.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::backend::ServedBy;
use crate::config::ConfigError;
use crate::failure::{Failure, FailureKind};
use crate::request::Capability;
use crate::units::{Bytes, ModelName, PipelineName, StepId};

/// What can go wrong between a request and its answer.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No model has that name.
    #[error("unknown model {model:?}{}", did_you_mean(nearest.as_deref()))]
    UnknownModel {
        /// The name that was asked for.
        model: String,
        /// The nearest name there is.
        nearest: Option<String>,
    },
    /// No pipeline has that name.
    #[error("unknown pipeline {pipeline:?}{}", did_you_mean(nearest.as_deref()))]
    UnknownPipeline {
        /// The name that was asked for.
        pipeline: String,
        /// The nearest name there is.
        nearest: Option<String>,
    },
    /// The model's backend cannot do that.
    #[error("model {model} cannot {capability}")]
    Unsupported {
        /// The model.
        model: ModelName,
        /// What was asked of it.
        capability: Capability,
    },
    /// The model can never fit, whatever is evicted. Nothing was evicted.
    #[error(
        "model {model} needs {asked}, but at most {left} of the budget of {budget} can be freed for it{}",
        held_by(holders)
    )]
    OverBudget {
        /// The model.
        model: ModelName,
        /// Its estimate.
        asked: Bytes,
        /// What pinned models leave of the budget.
        left: Bytes,
        /// The budget.
        budget: Bytes,
        /// The pinned models, largest first.
        holders: Vec<Holder>,
    },
    /// The resident models together are larger than the budget. None of them was loaded.
    #[error("the resident models need {asked} together, more than the budget of {budget}{}", held_by(models))]
    ResidentsOverBudget {
        /// The sum of their estimates, shared weights counted once, and what of the budget is kept spare.
        asked: Bytes,
        /// The budget.
        budget: Bytes,
        /// What each is estimated to take, largest first.
        models: Vec<Holder>,
    },
    /// A budget of nothing holds no model.
    #[error("the budget must be more than 0 B")]
    NoBudget,
    /// No more LLMs may be loaded, and all that are loaded are pinned. Nothing was evicted.
    #[error("model {model} would be LLM number {}, but max_concurrent_llms is {limit} and all are pinned", limit + 1)]
    TooManyLlms {
        /// The model.
        model: ModelName,
        /// `max_concurrent_llms`.
        limit: usize,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests are waiting already, the most this pool allows; try again later")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// The request's deadline passed.
    #[error("model {model} was not ready within {}{}{}", seconds(*waited), held_by(holders), short(*machine, *others))]
    WaitTimeout {
        /// The model.
        model: ModelName,
        /// How long the request waited.
        waited: Duration,
        /// Who held the memory, largest first.
        holders: Vec<Holder>,
        /// What the machine had memory for, where that was less than the budget.
        machine: Option<Bytes>,
        /// How much of the budget other processes had, where they share it.
        others: Bytes,
    },
    /// A recent load of the model failed; the next try comes later.
    #[error("model {model} failed to load, next try in {}: {cause}", seconds(*retry_in))]
    LoadBackoff {
        /// The model.
        model: ModelName,
        /// When the next load may be tried.
        retry_in: Duration,
        /// Why the last one failed.
        cause: Failure,
    },
    /// The model could not be loaded.
    #[error("model {model} could not be loaded: {cause}")]
    Load {
        /// The model.
        model: ModelName,
        /// Why.
        cause: Failure,
    },
    /// The request failed while it ran.
    #[error("model {model} ({served_by}): {cause}")]
    Request {
        /// The model.
        model: ModelName,
        /// Who ran it.
        served_by: ServedBy,
        /// Why it failed.
        cause: Failure,
    },
    /// The model's first choice failed, and so did every fallback.
    #[error("model {model}: {first}; fallback: {last}")]
    FallbackFailed {
        /// The model.
        model: ModelName,
        /// Why the first choice failed.
        first: Box<Error>,
        /// Why the last fallback failed.
        last: Box<Error>,
    },
    /// The model is in use and cannot be unloaded now.
    #[error("model {model} is in use by {leases} request(s)")]
    InUse {
        /// The model.
        model: ModelName,
        /// How many use it.
        leases: usize,
    },
    /// The model is pinned.
    #[error("model {model} is pinned; unpin it first")]
    Pinned {
        /// The model.
        model: ModelName,
    },
    /// The pool is shutting down, or gone.
    #[error("the pool is shutting down")]
    ShuttingDown,
    /// A pool needs a tokio runtime around it.
    #[error("a pool has to be started within a tokio runtime")]
    NoRuntime,
    /// A step of a pipeline failed.
    #[error("pipeline {pipeline}, step {step}: {source}")]
    Step {
        /// The pipeline.
        pipeline: PipelineName,
        /// The step.
        step: StepId,
        /// What failed.
        source: Box<Error>,
    },
    /// A step's template failed on the data it was given.
    #[error("template: {message}")]
    Template {
        /// What the template engine says.
        message: String,
    },
    /// A step took longer than its timeout.
    #[error("it took longer than its timeout of {}", seconds(*limit))]
    StepTimeout {
        /// The step's timeout.
        limit: Duration,
    },
    /// A run was not given what its pipeline takes.
    #[error("pipeline {pipeline} needs {what}")]
    MissingInput {
        /// The pipeline.
        pipeline: PipelineName,
        /// What is missing: text, audio or an image.
        what: &'static str,
    },
    /// No tone has that name.
    #[error("unknown tone {tone:?}; there are {}", known.join(", "))]
    UnknownTone {
        /// The name that was asked for.
        tone: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// No router is configured, or it has no rule that gives a model.
    #[error("no route: {message}")]
    NoRoute {
        /// Why.
        message: String,
    },
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Who holds memory, and how much.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// The model.
    pub model: ModelName,
    /// What the ledger holds for it.
    pub bytes: Bytes,
}

/// What kind of error it was: the row of the tables that give exit codes and, for servers, statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The caller named something that does not exist or cannot do it.
    Usage,
    /// The configuration is not usable.
    Config,
    /// The memory budget or the limit on LLMs does not allow it.
    OverBudget,
    /// A host could not be reached and nothing else could answer.
    Unreachable,
    /// Too much waits here, or the host is busy.
    Overloaded,
    /// A deadline passed.
    Timeout,
    /// The request cannot be carried out as given: its prompt does not fit the context, the host refuses it.
    BadRequest,
    /// The model's state does not allow it now: it is in use, or pinned.
    Conflict,
    /// The request failed.
    Failed,
    /// The pool or its caller ended it.
    Cancelled,
}

impl Error {
    /// The error's kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownModel { .. }
            | Self::UnknownPipeline { .. }
            | Self::Unsupported { .. }
            | Self::NoBudget
            | Self::MissingInput { .. }
            | Self::UnknownTone { .. }
            | Self::NoRoute { .. } => ErrorKind::Usage,
            Self::Config(_) => ErrorKind::Config,
            Self::OverBudget { .. } | Self::ResidentsOverBudget { .. } | Self::TooManyLlms { .. } => {
                ErrorKind::OverBudget
            }
            Self::QueueFull { .. } => ErrorKind::Overloaded,
            Self::WaitTimeout { .. } | Self::StepTimeout { .. } => ErrorKind::Timeout,
            Self::InUse { .. } | Self::Pinned { .. } => ErrorKind::Conflict,
            Self::LoadBackoff { cause, .. } | Self::Load { cause, .. } | Self::Request { cause, .. } => {
                cause.kind.into()
            }
            // A fallback that failed is as good as none: the first error counts then.
            Self::FallbackFailed { first, last, .. } => match last.kind() {
                ErrorKind::Failed => first.kind(),
                kind => kind,
            },
            Self::Step { source, .. } => source.kind(),
            Self::Template { .. } | Self::NoRuntime => ErrorKind::Failed,
            Self::ShuttingDown => ErrorKind::Cancelled,
        }
    }

    /// Whether another backend of the same model may answer instead, as long as no text has been passed on.
    #[must_use]
    pub fn allows_fallback(&self) -> bool {
        match self {
            Self::LoadBackoff { cause, .. } | Self::Load { cause, .. } | Self::Request { cause, .. } => {
                cause.kind.allows_fallback()
            }
            // The first choice does not fit, or not in time; a fallback may be loaded already, or on a host.
            Self::OverBudget { .. } | Self::TooManyLlms { .. } | Self::WaitTimeout { .. } => true,
            Self::UnknownModel { .. }
            | Self::UnknownPipeline { .. }
            | Self::Unsupported { .. }
            | Self::ResidentsOverBudget { .. }
            | Self::NoBudget
            | Self::QueueFull { .. }
            | Self::FallbackFailed { .. }
            | Self::InUse { .. }
            | Self::Pinned { .. }
            | Self::ShuttingDown
            | Self::NoRuntime
            | Self::Step { .. }
            | Self::Template { .. }
            | Self::StepTimeout { .. }
            | Self::MissingInput { .. }
            | Self::UnknownTone { .. }
            | Self::NoRoute { .. }
            | Self::Config(_) => false,
        }
    }

    /// Whether the same request may succeed a little later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::QueueFull { .. } | Self::WaitTimeout { .. } | Self::StepTimeout { .. } => true,
            Self::LoadBackoff { cause, .. } | Self::Load { cause, .. } | Self::Request { cause, .. } => {
                cause.kind.allows_fallback()
            }
            Self::FallbackFailed { last, .. } => last.may_pass(),
            Self::Step { source, .. } => source.may_pass(),
            _ => false,
        }
    }
}

impl From<FailureKind> for ErrorKind {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::Unreachable => Self::Unreachable,
            FailureKind::Timeout => Self::Timeout,
            FailureKind::Busy => Self::Overloaded,
            FailureKind::Refused
            | FailureKind::ContextOverflow
            | FailureKind::BadRequest
            | FailureKind::BadMedia
            | FailureKind::NoSpeech
            | FailureKind::Unsupported => Self::BadRequest,
            FailureKind::Cancelled => Self::Cancelled,
            FailureKind::HostError
            | FailureKind::ModelMissing
            | FailureKind::Denied
            | FailureKind::Protocol
            | FailureKind::CutOff
            | FailureKind::FileMissing
            | FailureKind::BadFile
            | FailureKind::Engine
            | FailureKind::EngineGone => Self::Failed,
        }
    }
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|name| format!(", did you mean {name:?}?")).unwrap_or_default()
}

fn held_by(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return String::new();
    }
    let list: Vec<String> = holders.iter().take(3).map(|h| format!("{} {}", h.model, h.bytes)).collect();
    format!(" (held by {})", list.join(", "))
}

fn short(machine: Option<Bytes>, others: Bytes) -> String {
    let machine = machine.map(|bytes| format!("; the machine has memory for {bytes} of models just now"));
    let others =
        (others > Bytes::ZERO).then(|| format!("; other processes have {others} of the shared budget"));
    machine.unwrap_or_default() + &others.unwrap_or_default()
}

fn seconds(duration: Duration) -> impl fmt::Display {
    format!("{:.1} s", duration.as_secs_f64())
}

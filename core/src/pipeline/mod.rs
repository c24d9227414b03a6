//! Pipelines: steps that ask models, each with the answers of those before it.
//!
//! [`Pipeline::compile`] checks every template and makes the steps a graph by what they refer to; [`Pipeline::run`]
//! works the graph off as a stream of events (`run.rs`), each step by itself (`step.rs`). All steps of a run live in that one
//! stream: dropping it stops them all. A step that says another one's text again takes it sentence by sentence
//! (`sentences.rs`), while the other one still writes.

mod compile;
mod report;
mod run;
mod sentences;
mod step;

pub(crate) use compile::is_template;
pub use compile::{Pipeline, TemplateProblem};
pub use report::{PipelineEvent, PipelineReport, StepReport};
pub use run::{Input, PipelineStream};

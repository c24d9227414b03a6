//! Pipelines: steps that ask models, each with the answers of those before it.
//!
//! [`Pipeline::compile`] checks every template and makes the steps a graph by what they refer to; [`Pipeline::run`]
//! works the graph off as a stream of events. All steps of a run live in that one stream: dropping it stops them all.

mod compile;
mod report;
mod run;

pub use compile::{Pipeline, TemplateProblem};
pub use report::{PipelineEvent, PipelineReport, StepReport};
pub use run::{Input, PipelineStream};

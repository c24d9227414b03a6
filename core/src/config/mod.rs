//! The configuration: raw YAML shapes, checked into domain types.

mod domain;

pub use domain::{
    Class, Config, Context, GgufConfig, HostConfig, InputKind, MemoryConfig, MetricsConfig, ModelConfig,
    PipelineConfig, Place, QueueConfig, Role, RouterConfig, RouterKind, StepAction, StepConfig, Strategy,
    Weights,
};

use std::fmt;
use std::path::PathBuf;

/// All problems of a configuration, in the file's order.
#[derive(Clone, Debug, thiserror::Error)]
pub struct ConfigError {
    /// The problems; never empty.
    pub problems: Vec<Problem>,
}

/// One problem of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, where there is one.
    pub file: Option<PathBuf>,
    /// The line in it, from 1.
    pub line: Option<usize>,
    /// The key's path, such as `models.solar.host`; empty for the whole file.
    pub path: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

/// `file:line: path: message`, as far as each is known.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
            if let Some(line) = self.line {
                write!(f, "{line}:")?;
            }
            write!(f, " ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        write!(f, "{}", self.message)
    }
}

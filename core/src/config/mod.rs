//! The configuration: raw YAML shapes, checked into domain types.
//!
//! [`load`] reads a file in four passes over one tree that knows its lines: parse, expand `${VAR}`, look for unknown
//! keys by the JSON schema, and check. Each pass notes its problems and goes on, so that all come in one go; only a
//! text that is not YAML ends it early.

mod at;
mod build;
mod check;
mod domain;
mod expand;
mod field;
mod hosts;
mod include;
mod limits;
mod models;
mod pipelines;
mod places;
mod raw;
mod resolved;
mod router;
mod schema;
mod sources;
mod tones;
mod tree;
mod values;

pub use domain::{
    Budget, Class, Config, Context, GgufConfig, HostConfig, HostKind, InputConfig, KvCacheType, MemoryConfig,
    MetricsConfig, ModelConfig, ModelRole, OnHost, PipelineConfig, Place, QueueConfig, RouterConfig,
    RouterKind, RouterRule, SessionsConfig, StepAction, StepConfig, Strategy, Weights,
};
pub use raw::Preset;
pub use resolved::{Resolved, Setting};
pub use schema::json_schema;
pub use sources::{Env, Origin, Overrides, Source, Variable};

use std::fmt;
use std::path::{Path, PathBuf};

use at::At;
use check::Check;
use field::Field;

/// Reads and checks the configuration file at `path`. Of the file system, it looks at this file, those of its pipelines, and at
/// which of the models' files are there; they need not be.
///
/// # Errors
/// The file cannot be read, or has problems: all of them, in the file's order.
pub fn load(path: &Path, env: &Env, overrides: &Overrides) -> Result<Resolved, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot read the configuration: {error}");
        let (file, path) = (Some(path.to_path_buf()), String::new());
        ConfigError { problems: vec![Problem { file, line: None, path, message }] }
    })?;
    parse(&text, Some(path), env, overrides)
}

/// Checks the text of a configuration. `file` is the one it comes from: problems name it, and models' files are
/// looked for in its folder.
///
/// # Errors
/// The text has problems: all of them, in the file's order.
pub fn parse(
    text: &str,
    file: Option<&Path>,
    env: &Env,
    overrides: &Overrides,
) -> Result<Resolved, ConfigError> {
    let mut check = Check::new(file, env);
    let mut root = tree::read(text).map_err(|misfits| {
        let problem = |misfit: tree::Misfit| Problem {
            file: file.map(Path::to_path_buf),
            line: Some(misfit.line),
            path: String::new(),
            message: misfit.message,
        };
        ConfigError { problems: misfits.into_iter().map(problem).collect() }
    })?;
    expand::expand(&mut root, "", &mut check);
    include::pipelines(&mut root, &mut check);
    schema::unknown_keys(&root, &mut check);
    let config = build::config(Field::of(root.to_value()), &At::root(&root), overrides, &mut check);
    let findings = check.finish()?;
    Ok(Resolved { config, warnings: findings.warnings, settings: findings.settings })
}

/// All problems of a configuration, in the file's order.
#[derive(Clone, Debug, thiserror::Error)]
pub struct ConfigError {
    /// The problems; never empty.
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// One problem at a path, of a configuration that came from no file.
    #[must_use]
    pub fn of(path: impl Into<String>, message: impl Into<String>) -> Self {
        let problem = Problem { file: None, line: None, path: path.into(), message: message.into() };
        Self { problems: vec![problem] }
    }
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

use std::io;
use std::path::PathBuf;

use sarai::core::Holder;
use sarai::{Bytes, Error, ErrorKind};
use serde_json::{Value, json};

/// How a command fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Sarai(#[from] Error),
    /// A plan's verdict, which the result has told already.
    #[error(transparent)]
    Refused(Error),
    #[error("host {host}: {source}")]
    Host { host: String, source: sarai::agents::Error },
    #[error("no configuration: neither {} is there", list(tried))]
    NoConfiguration { tried: Vec<PathBuf> },
    #[error("{0}")]
    Usage(String),
    /// A file that an argument names.
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{what}")]
    Io { what: String, source: io::Error },
    #[error("cannot make the model {}", path.display())]
    Synthesis { path: PathBuf, source: sarai_support::gguf::Error },
    /// Models that a bench wants to be there at once, of which some had to leave.
    #[error("the models cannot be there at once, {} had to leave: they need {asked} of a budget of {budget}", left.join(", "))]
    NotAtOnce { left: Vec<String>, asked: Bytes, budget: Bytes, models: Vec<Holder> },
    /// More models than may be there at once.
    #[error("{asked} LLMs are to be there at once, but max_concurrent_llms is {limit}")]
    TooManyLlms { asked: usize, limit: usize },
    /// Checks of a bench that failed, which the result has told already.
    #[error("failed: {0}")]
    Checks(String),
    #[error("interrupted")]
    Interrupted,
}

/// The program's exit code for each kind of error.
const CODES: &[(ErrorKind, u8)] = &[
    (ErrorKind::Usage, 2),
    (ErrorKind::Config, 2),
    (ErrorKind::OverBudget, 3),
    (ErrorKind::Unreachable, 4),
    (ErrorKind::Overloaded, 1),
    (ErrorKind::Timeout, 1),
    (ErrorKind::BadRequest, 1),
    (ErrorKind::Conflict, 1),
    (ErrorKind::Failed, 1),
    (ErrorKind::Cancelled, 1),
];

impl Failure {
    pub(super) fn code(&self) -> u8 {
        if matches!(self, Self::Interrupted) {
            return 130;
        }
        CODES.iter().find(|(kind, _)| *kind == self.kind()).map_or(1, |(_, code)| *code)
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::Sarai(error) | Self::Refused(error) => error.kind(),
            Self::Host { source, .. } if is_unreachable(source) => ErrorKind::Unreachable,
            Self::NoConfiguration { .. } => ErrorKind::Config,
            Self::Usage(_) | Self::Unreadable { .. } => ErrorKind::Usage,
            Self::NotAtOnce { .. } | Self::TooManyLlms { .. } => ErrorKind::OverBudget,
            Self::Interrupted => ErrorKind::Cancelled,
            Self::Host { .. } | Self::Io { .. } | Self::Synthesis { .. } | Self::Checks(_) => {
                ErrorKind::Failed
            }
        }
    }

    /// What to do about it, where that can be said.
    pub(super) fn hint(&self) -> Option<String> {
        match self {
            Self::Sarai(error) => hint(error),
            Self::NoConfiguration { .. } => Some("try `sarai demo`, or name a file with --config".to_owned()),
            Self::NotAtOnce { .. } => Some(
                "raise memory.max_ram_gb (or --max-ram-gb), or name fewer models with --models".to_owned(),
            ),
            Self::TooManyLlms { .. } => Some(
                "raise memory.max_concurrent_llms (or --max-concurrent-llms), or name fewer models with --models"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// The error as an object: its kind, its message, and its numbers.
    pub(super) fn json(&self) -> Value {
        let mut error = json!({"kind": self.kind(), "message": self.message()});
        if let Some(hint) = self.hint() {
            error["hint"] = hint.into();
        }
        match self {
            Self::Sarai(sarai) => add_numbers(sarai, &mut error),
            Self::NotAtOnce { left, asked, budget, models } => {
                error["left"] = json!(left);
                error["asked_bytes"] = json!(asked);
                error["budget_bytes"] = json!(budget);
                error["holders"] = json!(models);
            }
            Self::TooManyLlms { asked, limit } => {
                error["asked_llms"] = json!(asked);
                error["max_concurrent_llms"] = json!(limit);
            }
            _ => {}
        }
        json!({"error": error})
    }

    /// The message with all its causes.
    pub(super) fn message(&self) -> String {
        let mut text = self.to_string();
        let mut below = std::error::Error::source(self);
        while let Some(error) = below {
            let cause = error.to_string();
            if !text.contains(&cause) {
                text = format!("{text}: {cause}");
            }
            below = error.source();
        }
        text
    }
}

fn add_numbers(error: &Error, to: &mut Value) {
    match error {
        Error::OverBudget { model, asked, left, budget, holders } => {
            to["model"] = json!(model);
            to["asked_bytes"] = json!(asked);
            to["left_bytes"] = json!(left);
            to["budget_bytes"] = json!(budget);
            to["holders"] = json!(holders);
        }
        Error::ResidentsOverBudget { asked, budget, models } => {
            to["asked_bytes"] = json!(asked);
            to["budget_bytes"] = json!(budget);
            to["holders"] = json!(models);
        }
        Error::TooManyLlms { model, limit } => {
            to["model"] = json!(model);
            to["max_concurrent_llms"] = json!(limit);
        }
        Error::WaitTimeout { model, waited, holders, machine, others } => {
            to["model"] = json!(model);
            to["waited_ms"] = json!(waited.as_millis() as u64);
            to["holders"] = json!(holders);
            to["machine_bytes"] = json!(machine);
            to["others_bytes"] = json!(others);
        }
        Error::Load { model, cause } => {
            to["model"] = json!(model);
            to["cause"] = json!(cause.kind);
        }
        Error::Request { model, served_by, cause } => {
            to["model"] = json!(model);
            to["served_by"] = json!(served_by);
            to["cause"] = json!(cause.kind);
        }
        Error::LoadBackoff { model, retry_in, cause } => {
            to["model"] = json!(model);
            to["cause"] = json!(cause.kind);
            to["retry_in_ms"] = json!(retry_in.as_millis() as u64);
        }
        Error::Config(config) => {
            let problem = |p: &sarai::core::config::Problem| json!({"file": p.file, "line": p.line, "path": p.path, "message": p.message});
            to["problems"] = config.problems.iter().map(problem).collect();
        }
        Error::Step { pipeline, step, source } => {
            to["pipeline"] = json!(pipeline);
            to["step"] = json!(step);
            add_numbers(source, to);
        }
        Error::FallbackFailed { last, .. } => add_numbers(last, to),
        _ => {}
    }
}

fn hint(error: &Error) -> Option<String> {
    use sarai::Capability;
    use sarai::core::failure::FailureKind;
    match error {
        Error::OverBudget { .. } => Some(
            "raise memory.max_ram_gb (or --max-ram-gb), give the model a smaller context, or take a smaller file"
                .to_owned(),
        ),
        Error::ResidentsOverBudget { .. } => Some(
            "raise memory.max_ram_gb (or --max-ram-gb), or give some of them class: on_demand".to_owned(),
        ),
        Error::UnknownModel { .. } => Some("`sarai ps` lists the models".to_owned()),
        Error::Unsupported {
            capability: Capability::See | Capability::Hear | Capability::Transcribe,
            ..
        } => {
            Some("a local model sees and hears with a projector, mmproj: in the configuration".to_owned())
        }
        Error::Load { cause, .. } if cause.kind == FailureKind::FileMissing => {
            Some("put the file there, or set the model's path: or mmproj: in the configuration".to_owned())
        }
        Error::Request { cause, .. } if cause.kind == FailureKind::Unreachable => Some(
            "is the host running? A local file can stand in for it with fallback: gguf_native".to_owned(),
        ),
        Error::Request { cause, .. } if cause.kind == FailureKind::ModelMissing => {
            Some("the host does not have this model; set host_model: to one that it has".to_owned())
        }
        Error::FallbackFailed { last, .. } => hint(last),
        Error::Step { source, .. } => hint(source),
        _ => None,
    }
}

fn is_unreachable(error: &sarai::agents::Error) -> bool {
    error.kind() == sarai::core::failure::FailureKind::Unreachable
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" nor ")
}

#[cfg(test)]
mod tests {
    use sarai::core::backend::ServedBy;
    use sarai::core::failure::{Failure as Cause, FailureKind};

    use super::*;

    #[test]
    fn every_kind_of_error_has_its_exit_code() {
        let code = |error: Error| Failure::from(error).code();
        let model = || "m".parse().unwrap();
        let bytes = sarai::core::units::Bytes(1);
        assert_eq!(code(Error::UnknownModel { model: "m".into(), nearest: None }), 2);
        assert_eq!(
            code(Error::OverBudget {
                model: model(),
                asked: bytes,
                left: bytes,
                budget: bytes,
                holders: vec![]
            }),
            3
        );
        assert_eq!(code(Error::QueueFull { waiting: 1 }), 1);
        for kind in [FailureKind::BadMedia, FailureKind::NoSpeech] {
            let served_by = ServedBy::GgufNative("m.gguf".into());
            assert_eq!(code(Error::Request { model: model(), served_by, cause: Cause::new(kind, "?") }), 1);
        }
        let unreadable = Failure::Unreadable { path: "a.wav".into(), source: io::ErrorKind::NotFound.into() };
        assert_eq!(unreadable.code(), 2);
        assert_eq!(Failure::TooManyLlms { asked: 3, limit: 2 }.code(), 3);
        assert_eq!(Failure::Interrupted.code(), 130);
    }
}

//! What can go wrong when a file is made.

use std::path::PathBuf;
use std::{fmt, io};

/// Why a GGUF file was not made.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be created, written or renamed.
    Io {
        /// The file asked for.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The writer handed in failed.
    Write(io::Error),
    /// A setting of the model does not go with the others.
    Setting {
        /// The setting's name.
        name: &'static str,
        /// What it has to be.
        rule: String,
    },
    /// The tensor's rows are no whole number of its type's blocks, or two tensors have this name.
    Tensor {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The classifier's label or keyword cannot be used.
    Label {
        /// The label or keyword.
        text: String,
        /// What it has to be.
        rule: &'static str,
    },
    /// The file has nothing that this damage could be done to.
    Damage(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, .. } => write!(f, "cannot write {}", path.display()),
            Self::Write(_) => f.write_str("cannot write the file's bytes"),
            Self::Setting { name, rule } => write!(f, "{name} must be {rule}"),
            Self::Tensor { name, problem } => write!(f, "tensor {name}: {problem}"),
            Self::Label { text, rule } => write!(f, "classifier label or keyword {text:?}: {rule}"),
            Self::Damage(what) => write!(f, "nothing to damage: {what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } | Self::Write(source) => Some(source),
            Self::Setting { .. } | Self::Tensor { .. } | Self::Label { .. } | Self::Damage(_) => None,
        }
    }
}

use std::path::PathBuf;

use sarai_core::failure::{Failure, FailureKind};

/// How running a model can fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // GGUF files in process
    /// The file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not a model that can be loaded.
    #[error("{} {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file is a model, but not for this.
    #[error("{} cannot {wanted}: {reason}", path.display())]
    WrongModel {
        /// The file.
        path: PathBuf,
        /// What was wanted of it.
        wanted: String,
        /// Why not.
        reason: String,
    },
    /// llama.cpp did not load the file, although its header is in order.
    #[error("llama.cpp could not load {}; run with SARAI_LOG=debug to see its log", path.display())]
    LoadFailed {
        /// The file.
        path: PathBuf,
    },
    /// llama.cpp did not make a context.
    #[error("llama.cpp could not make a context of {n_ctx} tokens for {}", path.display())]
    ContextFailed {
        /// The file.
        path: PathBuf,
        /// The context's length.
        n_ctx: u32,
        /// What the binding says.
        source: llama_cpp_2::LlamaContextLoadError,
    },
    /// The load was stopped by its caller.
    #[error("the load of {} was stopped", path.display())]
    LoadCancelled {
        /// The file.
        path: PathBuf,
    },
    /// llama.cpp could not be started.
    #[error("llama.cpp could not be started")]
    Runtime {
        /// What the binding says.
        #[source]
        source: std::sync::Arc<llama_cpp_2::LlamaCppError>,
    },
    /// The prompt leaves no room in the context.
    #[error("the prompt has {tokens} tokens, and the context of {n_ctx} must leave room for an answer")]
    PromptTooLong {
        /// The prompt's tokens.
        tokens: usize,
        /// The context's length.
        n_ctx: u32,
    },
    /// A text to embed or classify is longer than the context.
    #[error("text {index} has {tokens} tokens, more than the context of {n_ctx}")]
    TextTooLong {
        /// Which text, from 0.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// The context's length.
        n_ctx: u32,
    },
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The model's own chat template is broken or refuses these messages.
    #[error("the model's chat template failed")]
    ChatTemplate {
        /// What the template engine says.
        #[from]
        source: minijinja::Error,
    },
    /// A step of the computation failed.
    #[error("llama.cpp failed to compute: {reason}")]
    Compute {
        /// What the binding says.
        reason: String,
    },
    /// The thread that ran the model is gone.
    #[error("the engine of {} has ended", path.display())]
    EngineGone {
        /// The model's file.
        path: PathBuf,
    },
}

impl Error {
    /// What kind of failure this is to the pool.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::ReadFile { .. } => FailureKind::FileMissing,
            Self::BadFile { .. } | Self::LoadFailed { .. } => FailureKind::BadFile,
            Self::WrongModel { .. } => FailureKind::Unsupported,
            Self::LoadCancelled { .. } => FailureKind::Cancelled,
            Self::PromptTooLong { .. } | Self::TextTooLong { .. } => FailureKind::ContextOverflow,
            Self::EmptyPrompt | Self::ChatTemplate { .. } => FailureKind::BadRequest,
            Self::ContextFailed { .. }
            | Self::Runtime { .. }
            | Self::Compute { .. }
            | Self::EngineGone { .. } => FailureKind::Engine,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error)
    }
}

//! What runs a model for sarai: GGUF files in this process through llama.cpp, and models of an Ollama host over HTTP.
//! Each implements [`sarai_core::backend::Backend`] and knows nothing of the pool.

mod error;
pub mod llama;
pub mod ollama;

pub use error::{Error, Stage};

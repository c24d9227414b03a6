//! What runs a model for sarai: GGUF files in this process through llama.cpp, and models of hosts over HTTP, of Ollama's kind or
//! of OpenAI's.
//! Each implements [`sarai_core::backend::Backend`] and knows nothing of the pool.

mod error;
pub mod llama;
mod media;
pub mod ollama;
pub mod openai;
pub mod remote;
mod text;

pub use error::{Error, Stage};

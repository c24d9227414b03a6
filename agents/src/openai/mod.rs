//! Hosts that speak OpenAI's API: llama-server, vLLM, LiteLLM, LM Studio, whisper.cpp's server, another sarai.
//!
//! The paths that are sent are `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`, `/v1/audio/transcriptions` and
//! `/v1/models`. The protocol has no way to load or unload a model, or to say how much memory one takes.

mod client;
mod stream;
mod wire;

pub use client::Client;

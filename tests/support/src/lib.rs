//! Synthetic GGUF models and a fault-injecting host.
#![forbid(unsafe_code)]

pub mod gguf;
#[cfg(feature = "host")]
pub mod host;

//! Synthetic GGUF models and a fault-injecting host.
#![forbid(unsafe_code)]

pub mod gguf;

//! Synthetic GGUF models and a fault-injecting host.

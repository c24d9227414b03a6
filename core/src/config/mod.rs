//! The configuration: raw YAML shapes, checked into domain types.

/// The problems of a configuration.
#[derive(Clone, Debug, thiserror::Error)]
#[error("bad configuration")]
pub struct ConfigError {}

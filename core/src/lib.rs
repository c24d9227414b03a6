//! The model pool of sarai: it decides which models are loaded, accounts for their memory, and routes requests to
//! them. It has no network and no llama.cpp; what runs a model comes in through [`backend::Backend`].

#![forbid(unsafe_code)]

pub mod answer;
pub mod audio;
pub mod backend;
pub mod config;
mod error;
pub mod failure;
pub mod image;
pub mod memory;
mod nearest;
pub mod pipeline;
pub mod pool;
pub mod request;
pub mod router;
pub mod scheduler;
pub mod simulate;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
pub mod tone;
pub mod units;

pub use error::{Error, ErrorKind, Holder};
pub use nearest::nearest;

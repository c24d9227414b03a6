//! Remote Ollamas, over their native HTTP API.
//!
//! Nothing here ever asks a host to delete, pull or change a file: the paths that are sent are `/api/chat`,
//! `/api/generate`, `/api/embed`, `/api/ps`, `/api/tags` and `/api/version`.

mod client;
mod memory;
mod residency;
mod room;
mod stream;
mod watch;
mod wire;

pub use client::Client;
pub use watch::{HostWatch, Watcher};
pub use wire::HostModel;

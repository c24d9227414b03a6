//! Scripted stand-ins for what the pool works with, for tests.

mod backend;
mod models;
mod probe;

pub use backend::FakeBackend;
pub use models::{FakeModels, Script};
pub use probe::FakeProbe;

//! Scripted stand-ins for what the pool works with, for tests.

mod backend;
mod probe;

pub use backend::FakeBackend;
pub use probe::FakeProbe;

//! Models on hosts, whatever protocol these speak: the choice among several hosts, the breakers that keep requests from
//! those that fail, deadlines and bodies over HTTP.

mod answer;
mod api;
mod backend;
mod body;
mod breaker;
mod choice;
mod deadlines;
mod host_model;
mod http;
mod numbers;
mod seat;
mod tool;

pub use api::{Deltas, HostApi};
pub use backend::RemoteBackend;

pub(crate) use answer::Answer;
pub(crate) use body::Lines;
pub(crate) use deadlines::Deadlines;
pub(crate) use http::{Http, cut, shown};
pub(crate) use numbers::{count, or_default, size};
pub(crate) use tool::WireTool;

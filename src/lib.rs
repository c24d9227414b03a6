//! sarai keeps several language models available at once on one modest machine, without running out of memory.
//!
//! Small models (embedding, router) stay resident; GGUF models load on demand, in this process, through llama.cpp;
//! large ones are served by a remote Ollama and fall back to a local file. A byte budget and a limit on LLMs hold at
//! every moment, and every answer says who served it and why.
//!
//! ```no_run
//! use futures::StreamExt;
//! use sarai::{AnswerEvent, CallOptions, GenerateRequest, Message, Sarai};
//!
//! # async fn example() -> Result<(), sarai::Error> {
//! let sarai = Sarai::from_file("config/sarai.yaml").await?;
//! let lfm2 = sarai.pool().handle("lfm2")?;
//! let request = GenerateRequest::chat(vec![Message::user("¿Qué es un budget de RAM?")]);
//! let mut answer = lfm2.generate(request, CallOptions::default()).await?;
//! while let Some(event) = answer.next().await {
//!     match event? {
//!         AnswerEvent::Text(text) => eprint!("{text}"),
//!         AnswerEvent::Done(end) => eprintln!("\nserved by {}", end.provenance.served_by),
//!     }
//! }
//! sarai.pool().shutdown(std::time::Duration::from_secs(10)).await;
//! # Ok(())
//! # }
//! ```
//!
//! The rooms: [`core`] decides and accounts, [`agents`] runs models, and this crate puts them together from a
//! configuration ([`Sarai`]). A pool can also be built without a file, see [`ModelPool::builder`].

#![forbid(unsafe_code)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod env;
mod host_memory;
mod restore;
mod wiring;

pub use sarai_agents as agents;
pub use sarai_core as core;

pub use sarai_core::answer::{
    Answer, AnswerEvent, AnswerStream, CallOptions, Handover, Models, OnStreamFailure, Priority, Provenance,
};
pub use sarai_core::audio::Audio;
pub use sarai_core::config::{Budget, Class, ModelRole, Preset};
pub use sarai_core::image::Image;
pub use sarai_core::pipeline::{Input, PipelineEvent, PipelineReport, PipelineStream};
pub use sarai_core::pool::{
    Lease, MemoryUsage, ModelHandle, ModelMemory, ModelPool, ModelSpec, PlaceSpec, PlannedModel, PoolBuilder,
    PoolEvent, PoolEvents,
};
pub use sarai_core::request::{
    Alternative, Capability, Constraint, Delta, Embeddings, FinishReason, GenerateRequest, LabelScore,
    Message, Prefill, Sampling, TokenLogprob, Tool, ToolCall, TranscribeRequest, Truncate,
};
pub use sarai_core::router::{Router, Routing};
pub use sarai_core::scheduler::{Change, Limits, Phase};
pub use sarai_core::tone::{Tone, Tones};
pub use sarai_core::units::{Bytes, HostName, ModelName};
pub use sarai_core::{Error, ErrorKind};
pub use wiring::Sarai;

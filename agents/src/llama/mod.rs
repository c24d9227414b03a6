//! GGUF files in this process, through llama.cpp.
//!
//! The way of a file: its header is read and checked (`header.rs`, `check.rs`), its size estimated (`estimate.rs`), it is
//! loaded on a thread of its own (`load.rs`), which then works off its requests one at a time (`worker.rs`).

mod check;
mod embed;
mod estimate;
mod generate;
mod header;
mod load;
mod measure;
mod runtime;
mod sampling;
mod template;
mod text;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use sarai_core::backend::{Backend, LoadRequest, Model, ServedBy};
use sarai_core::config::{Context, Weights};
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::Estimate;
use sarai_core::request::{Capabilities, Capability};
use sarai_core::units::Bytes;

use crate::Error;
use header::Header;

/// A GGUF file and how to run it.
#[derive(Clone, Debug)]
pub struct GgufSettings {
    /// The file.
    pub path: PathBuf,
    /// What it is wanted for: [`Capability::Generate`], [`Capability::Embed`] or [`Capability::Classify`].
    pub purpose: Capability,
    /// The context length.
    pub context: Context,
    /// How the weights are held. `Auto` is the plain map.
    pub weights: Weights,
    /// CPU threads; `None` takes all that this process may use.
    pub threads: Option<usize>,
}

/// Requests to an embedding model or classifier that may stand at its thread: each is over quickly.
const HELPER_PARALLEL: usize = 8;

/// Runs one GGUF file.
#[derive(Debug)]
pub struct GgufBackend {
    settings: Arc<GgufSettings>,
}

impl GgufBackend {
    /// A backend for a file. Nothing is read yet.
    #[must_use]
    pub fn new(settings: GgufSettings) -> Self {
        Self { settings: Arc::new(settings) }
    }
}

#[async_trait]
impl Backend for GgufBackend {
    fn served_by(&self) -> ServedBy {
        ServedBy::GgufNative(self.settings.path.clone())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::of(&[self.settings.purpose])
    }

    fn parallel(&self) -> usize {
        if self.settings.purpose == Capability::Generate { 1 } else { HELPER_PARALLEL }
    }

    async fn estimate(&self, available: Bytes) -> Result<Estimate, Failure> {
        let settings = Arc::clone(&self.settings);
        let estimate = move || {
            let header = read_header(&settings)?;
            Ok(estimate::estimate(&header, &settings, available))
        };
        blocking(estimate).await
    }

    async fn load(&self, request: LoadRequest) -> Result<Arc<dyn Model>, Failure> {
        let settings = Arc::clone(&self.settings);
        // The file may have changed since its size was asked for: what llama.cpp gets to see is checked again.
        let header = blocking(move || read_header(&settings)).await?;
        let model = worker::start(Arc::clone(&self.settings), header, request).await?;
        Ok(Arc::new(model))
    }
}

fn read_header(settings: &GgufSettings) -> Result<Header, Error> {
    let header = Header::read(&settings.path)?;
    check::check(&header)?;
    check::suits(&header, settings.purpose)?;
    Ok(header)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|panic| Failure::new(FailureKind::Engine, panic))?.map_err(Failure::from)
}

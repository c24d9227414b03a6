//! GGUF files in this process, through llama.cpp.
//!
//! The way of a file: its header is read and checked (`header.rs`, `check.rs`, `projector.rs`), its size estimated (`estimate.rs`), it is
//! loaded (`load.rs`) on a thread of its own (`thread.rs`) into a context (`context.rs`). A model that generates then
//! serves all its requests in one loop (`engine/`, behind `generator.rs`), as does one that reads whole texts
//! (`encoder.rs`).
//!
//! The way of a request for text: template and tokens (`prompt.rs`, `template.rs`), the loop, and for each token its
//! choice (`sampling.rs`, `constrain.rs`, `grammar.rs`) and its text (`text.rs`, `tools.rs`). Images and audio beside it become
//! embeddings first (`multimodal/`); speech is written down by such requests (`transcribe.rs`).

mod check;
mod constrain;
mod context;
mod encoder;
mod engine;
mod estimate;
mod generator;
mod grammar;
mod header;
mod large_pages;
mod load;
mod log;
mod measure;
mod multimodal;
mod projector;
mod prompt;
mod record;
mod runtime;
mod sampling;
mod sessions;
mod template;
mod thread;
mod took;
mod tools;
mod transcribe;
mod weights;

pub use runtime::set_free_running;
pub use sessions::SessionStore;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sarai_core::backend::{Backend, LoadRequest, Model, ServedBy};
use sarai_core::config::{Context, KvCacheType, Weights};
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::Estimate;
use sarai_core::request::{Capabilities, Capability};
use sarai_core::units::Bytes;

use crate::Error;
use header::Header;
use projector::Projection;

/// A GGUF file and how to run it.
#[derive(Clone, Debug)]
pub struct GgufSettings {
    /// The file.
    pub path: PathBuf,
    /// What it is wanted for: to generate, embed, classify or rerank. A model that sees or hears is one that generates, with a
    /// projector.
    pub purpose: Capability,
    /// The context length.
    pub context: Context,
    /// How the weights are held. `Auto` is the plain map, and for a resident model the faster way: that is measured at
    /// its first load.
    pub weights: Weights,
    /// What keys and values are kept as.
    pub kv_cache_type: KvCacheType,
    /// Whether the model stays loaded.
    pub resident: bool,
    /// The folder that remembers what was measured: which way to hold the weights is faster, and what loads took. Without
    /// one, nothing is remembered.
    pub measurements: Option<PathBuf>,
    /// CPU threads; `None` takes all that this process may use.
    pub threads: Option<usize>,
    /// Requests that may run at once; `None` is 4 for a model that generates, else 16. They share the context.
    pub parallel: Option<usize>,
    /// LoRA adapters, and the scale of each.
    pub lora: Vec<(PathBuf, f32)>,
    /// The projector for images and audio of a model that generates.
    pub mmproj: Option<PathBuf>,
    /// The projector's memory is given back when it had nothing to do for so long; `None` keeps it.
    pub projector_ttl: Option<Duration>,
    /// Where conversations are kept when they have to leave the context; `None` keeps none.
    pub sessions: Option<Arc<SessionStore>>,
}

impl GgufSettings {
    /// A file for a purpose, all else by default: a context by free memory, no adapters, no session store.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, purpose: Capability) -> Self {
        Self {
            path: path.into(),
            purpose,
            context: Context::Auto { min: 1000, max: 8000 },
            weights: Weights::Auto,
            kv_cache_type: KvCacheType::default(),
            resident: false,
            measurements: None,
            threads: None,
            parallel: None,
            lora: Vec::new(),
            mmproj: None,
            projector_ttl: None,
            sessions: None,
        }
    }

    /// Requests that may run at once.
    fn parallel(&self) -> u32 {
        let default = if self.purpose == Capability::Generate { LLM_PARALLEL } else { encoder::TEXTS };
        self.parallel
            .map_or(default, |parallel| u32::try_from(parallel).unwrap_or(u32::MAX))
            .clamp(1, MOST_PARALLEL)
    }
}

/// Requests that a model that generates takes at once: each of them gets slower with every other one.
const LLM_PARALLEL: u32 = 4;
/// llama.cpp has 256 sequences for a context (`LLAMA_MAX_SEQ`), some of which are kept for later requests.
const MOST_PARALLEL: u32 = 64;

/// Runs one GGUF file.
#[derive(Debug)]
pub struct GgufBackend {
    settings: Arc<GgufSettings>,
    capabilities: Capabilities,
}

impl GgufBackend {
    /// A backend for a file. Of it nothing is read yet; of a projector the header, which tells whether it sees and hears. One
    /// that cannot be read is taken to do both: the model's load fails then, and says why.
    #[must_use]
    pub fn new(settings: GgufSettings) -> Self {
        let capabilities = capabilities(&settings);
        Self { settings: Arc::new(settings), capabilities }
    }
}

#[async_trait]
impl Backend for GgufBackend {
    fn served_by(&self) -> ServedBy {
        ServedBy::GgufNative(self.settings.path.clone())
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn parallel(&self) -> usize {
        self.settings.parallel() as usize
    }

    async fn estimate(&self, available: Bytes) -> Result<Estimate, Failure> {
        let settings = Arc::clone(&self.settings);
        let estimate = move || {
            let (header, projection) = read_headers(&settings)?;
            let estimate = estimate::estimate(&header, projection.as_ref(), &settings, available);
            Ok(Estimate { weights_id: load::weights_id(&settings)?, ..estimate })
        };
        blocking(estimate).await
    }

    async fn load(&self, request: LoadRequest) -> Result<Arc<dyn Model>, Failure> {
        let settings = Arc::clone(&self.settings);
        // The file may have changed since its size was asked for: what llama.cpp gets to see is checked again.
        let (header, _) = blocking(move || read_headers(&settings)).await?;
        estimate::warn_of_cut(&header, &self.settings);
        let settings = Arc::clone(&self.settings);
        Ok(match self.settings.purpose {
            Capability::Generate | Capability::See | Capability::Hear | Capability::Transcribe => {
                Arc::new(generator::Generator::load(settings, header, request).await?)
            }
            Capability::Embed | Capability::Classify | Capability::Rerank => {
                Arc::new(encoder::Encoder::load(settings, header, request).await?)
            }
        })
    }
}

fn capabilities(settings: &GgufSettings) -> Capabilities {
    let mut all = Capabilities::of(&[settings.purpose]);
    if let Some(mmproj) = settings.mmproj.as_ref().filter(|_| settings.purpose == Capability::Generate) {
        let (sees, hears) = projector::towers(mmproj).unwrap_or((true, true));
        if sees {
            all = all.with(Capability::See);
        }
        if hears {
            all = all.with(Capability::Hear).with(Capability::Transcribe);
        }
    }
    all
}

/// The header of a file, and what its projector is, where it has one that will be used. Both are checked.
fn read_headers(settings: &GgufSettings) -> Result<(Header, Option<Projection>), Error> {
    let header = Header::read(&settings.path)?;
    check::check(&header)?;
    check::suits(&header, settings.purpose)?;
    check::can_keep(&header, settings.kv_cache_type)?;
    let projection = settings
        .mmproj
        .as_ref()
        .map(|mmproj| projector::check_projector(mmproj, header.int("{arch}.embedding_length").unwrap_or(0)))
        .transpose()?;
    Ok((header, projection.filter(|_| settings.purpose == Capability::Generate)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|panic| Failure::new(FailureKind::Engine, panic))?.map_err(Failure::from)
}

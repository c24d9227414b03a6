//! Models of a remote Ollama, over its native HTTP API.
//!
//! Nothing here ever asks a host to delete, pull or change a file: the paths that are sent are `/api/chat`,
//! `/api/generate`, `/api/embed`, `/api/ps` and `/api/version`.

mod client;
mod stream;
mod wire;

pub use client::Client;
pub use wire::HostModel;

use std::sync::Arc;

use async_trait::async_trait;
use sarai_core::backend::{Backend, LoadRequest, Model, ServedBy};
use sarai_core::failure::Failure;
use sarai_core::memory::{Estimate, Footprint, Freed};
use sarai_core::request::{Capabilities, Capability, Embeddings, GenerateRequest, TokenStream};
use sarai_core::units::Bytes;

/// One model of a host. It takes none of this process's memory; the host loads it when it is first asked.
#[derive(Clone, Debug)]
pub struct OllamaBackend {
    /// The host.
    pub client: Arc<Client>,
    /// The model's name there.
    pub model: String,
    /// The context length to ask for; `None` leaves it to the host.
    pub n_ctx: Option<u32>,
    /// What it is wanted for: [`Capability::Generate`] or [`Capability::Embed`].
    pub purpose: Capability,
}

#[async_trait]
impl Backend for OllamaBackend {
    fn served_by(&self) -> ServedBy {
        ServedBy::OllamaHttp(self.client.host().clone())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::of(&[self.purpose])
    }

    fn parallel(&self) -> usize {
        self.client.parallel()
    }

    async fn estimate(&self, _available: Bytes) -> Result<Estimate, Failure> {
        Ok(Estimate::default())
    }

    async fn load(&self, _request: LoadRequest) -> Result<Arc<dyn Model>, Failure> {
        Ok(Arc::new(self.clone()))
    }

    async fn unload_on_host(&self) -> Result<bool, Failure> {
        self.client.unload(&self.model).await?;
        Ok(true)
    }
}

#[async_trait]
impl Model for OllamaBackend {
    fn n_ctx(&self) -> Option<u32> {
        self.n_ctx
    }

    fn memory(&self) -> Option<Footprint> {
        Some(Footprint::NONE)
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, Failure> {
        Ok(self.client.generate(&self.model, self.n_ctx, &request).await?)
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embeddings, Failure> {
        Ok(self.client.embed(&self.model, self.n_ctx, &texts).await?)
    }

    async fn unload(&self) -> Option<Freed> {
        None
    }
}

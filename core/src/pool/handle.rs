use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use tokio::time::Instant;

use super::lease::Lease;
use super::stream::Answering;
use super::walk::Walk;
use super::{Inner, ModelPool};
use crate::answer::{AnswerStream, CallOptions, Models, Provenance};
use crate::config::ModelRole;
use crate::error::Error;
use crate::failure::{Failure, FailureKind};
use crate::request::{Capability, Embeddings, GenerateRequest, LabelScore};
use crate::units::ModelName;

/// A model of a pool. A cheap clone that holds nothing: each request takes a lease for as long as it runs, and loads
/// the model again if it was evicted meanwhile.
#[derive(Clone)]
pub struct ModelHandle {
    inner: Arc<Inner>,
    model: ModelName,
}

impl ModelHandle {
    pub(super) fn new(inner: Arc<Inner>, model: ModelName) -> Self {
        Self { inner, model }
    }

    /// The model's name.
    #[must_use]
    pub fn name(&self) -> &ModelName {
        &self.model
    }

    /// Holds the model until the lease is dropped, for several requests in a row on one place of it. Requests made on
    /// the lease itself have no fallback.
    ///
    /// # Errors
    /// No place of the model can be made ready in time and budget.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn lease(&self) -> Result<Lease, Error> {
        let (_, entry) = self.inner.entry(self.model.as_str())?;
        let capability = match entry.role {
            ModelRole::Llm => Capability::Generate,
            ModelRole::Embedding => Capability::Embed,
            ModelRole::Router => Capability::Classify,
        };
        Walk::new(&self.inner, &self.model, capability, CallOptions::default())?.lease().await
    }

    /// Continues a prompt. Returns with the first text, or with the end of an empty answer, so that everything that
    /// can fail before that may still be answered by a fallback.
    ///
    /// # Errors
    /// No place of the model can answer; the error is the first choice's where there is no fallback.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future, or later the stream, stops the work and returns the lease.
    pub async fn generate(
        &self,
        request: GenerateRequest,
        options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        let mut walk = Walk::new(&self.inner, &self.model, Capability::Generate, options)?;
        loop {
            let lease = walk.lease().await?;
            let slot = lease.slot;
            match self.first_text(lease, request.clone()).await {
                Ok(answering) => return Ok(Box::pin(answering)),
                Err(cause) => walk.request_failed(slot, cause)?,
            }
        }
    }

    async fn first_text(&self, lease: Lease, request: GenerateRequest) -> Result<Answering, Failure> {
        let granted = Instant::now();
        let mut tokens = lease.generate(request).await?;
        let ended = || Failure::new(FailureKind::CutOff, "the stream ended before its first token");
        let first = tokens.next().await.ok_or_else(ended)??;
        let metrics = self.inner.shared.metrics.of_model(&self.model);
        Ok(Answering::new(self.model.clone(), metrics, lease, tokens, first, granted))
    }

    /// Embeds texts; the vectors come in the texts' order, each of length 1.
    ///
    /// # Errors
    /// As for [`ModelHandle::generate`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn embed(
        &self,
        texts: Vec<String>,
        options: CallOptions,
    ) -> Result<(Embeddings, Provenance), Error> {
        let mut walk = Walk::new(&self.inner, &self.model, Capability::Embed, options)?;
        loop {
            let lease = walk.lease().await?;
            match lease.embed(texts.clone()).await {
                Ok(embeddings) => return Ok((embeddings, lease.provenance.clone())),
                Err(cause) => walk.request_failed(lease.slot, cause)?,
            }
        }
    }

    /// Scores a text for the labels of the model's classification head, highest first.
    ///
    /// # Errors
    /// As for [`ModelHandle::generate`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn classify(
        &self,
        text: String,
        options: CallOptions,
    ) -> Result<(Vec<LabelScore>, Provenance), Error> {
        let mut walk = Walk::new(&self.inner, &self.model, Capability::Classify, options)?;
        loop {
            let lease = walk.lease().await?;
            match lease.classify(text.clone()).await {
                Ok(scores) => return Ok((scores, lease.provenance.clone())),
                Err(cause) => walk.request_failed(lease.slot, cause)?,
            }
        }
    }
}

impl fmt::Debug for ModelHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ModelHandle").field(&self.model).finish()
    }
}

#[async_trait]
impl Models for ModelPool {
    async fn generate(
        &self,
        model: &ModelName,
        request: GenerateRequest,
        options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        self.handle(model.as_str())?.generate(request, options).await
    }

    async fn embed(
        &self,
        model: &ModelName,
        texts: Vec<String>,
        options: CallOptions,
    ) -> Result<(Embeddings, Provenance), Error> {
        self.handle(model.as_str())?.embed(texts, options).await
    }

    async fn classify(
        &self,
        model: &ModelName,
        text: String,
        options: CallOptions,
    ) -> Result<(Vec<LabelScore>, Provenance), Error> {
        self.handle(model.as_str())?.classify(text, options).await
    }
}

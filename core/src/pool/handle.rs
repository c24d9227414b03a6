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
        self.walk(entry.role.capability(), CallOptions::default())?.lease().await
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
        let metrics = self.inner.shared.metrics.of_model(&self.model);
        let first_text = |lease: Lease| {
            let (request, model, metrics) = (request.clone(), self.model.clone(), Arc::clone(&metrics));
            async move {
                let granted = Instant::now();
                let mut tokens = lease.model().generate(request).await.map_err(|cause| lease.noted(cause))?;
                let ended = || Failure::new(FailureKind::CutOff, "the stream ended before its first token");
                let first = tokens.next().await.ok_or_else(ended)?.map_err(|cause| lease.noted(cause))?;
                Ok(Answering::new(model, metrics, lease, tokens, first, granted))
            }
        };
        let answering = self.walk(Capability::Generate, options)?.ask(first_text).await?;
        Ok(Box::pin(answering))
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
        let embed = |lease: Lease| {
            let texts = texts.clone();
            async move {
                let embeddings = lease.model().embed(texts).await.map_err(|cause| lease.noted(cause))?;
                Ok((embeddings, lease.provenance().clone()))
            }
        };
        self.walk(Capability::Embed, options)?.ask(embed).await
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
        let classify = |lease: Lease| {
            let text = text.clone();
            async move {
                let scores = lease.model().classify(text).await.map_err(|cause| lease.noted(cause))?;
                Ok((scores, lease.provenance().clone()))
            }
        };
        self.walk(Capability::Classify, options)?.ask(classify).await
    }

    /// Scores each of `documents` for how well it answers `query`, from 0 to 1, in the documents' order.
    ///
    /// # Errors
    /// As for [`ModelHandle::generate`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn rerank(
        &self,
        query: String,
        documents: Vec<String>,
        options: CallOptions,
    ) -> Result<(Vec<f32>, Provenance), Error> {
        let rerank = |lease: Lease| {
            let (query, documents) = (query.clone(), documents.clone());
            async move {
                let scores =
                    lease.model().rerank(query, documents).await.map_err(|cause| lease.noted(cause))?;
                Ok((scores, lease.provenance().clone()))
            }
        };
        self.walk(Capability::Rerank, options)?.ask(rerank).await
    }

    fn walk(&self, capability: Capability, options: CallOptions) -> Result<Walk<'_>, Error> {
        Walk::new(&self.inner, &self.model, capability, options)
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

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use super::lease::Lease;
use super::stream::{Answering, Asks, Continues, Started};
use super::walk::{Attempt, Walk};
use super::{Inner, ModelPool};
use crate::answer::{AnswerStream, CallOptions, Models, OnStreamFailure, Provenance};
use crate::error::Error;
use crate::image::Image;
use crate::request::{Capability, Embeddings, GenerateRequest, LabelScore, Message, TranscribeRequest};
use crate::tone::Tone;
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
        self.walk(entry.role.capability(), None, CallOptions::default())?.lease().await
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
        let (_, entry) = self.inner.entry(self.model.as_str())?;
        let metrics = self.inner.shared.metrics.of_model(&self.model);
        let mut walk = self.walk(request.capability(), request.conversation(), options)?;
        let started = walk.ask(|attempt| Started::at(attempt, Asks::Generate(request.clone()))).await?;
        let on_failure = options.on_stream_failure.unwrap_or(entry.on_stream_failure);
        let continues = on_failure == OnStreamFailure::Continue && request.tools.is_empty();
        let continues = continues.then(|| Continues::new(request, walk));
        Ok(Box::pin(Answering::new(self.model.clone(), metrics, started, continues)))
    }

    /// Says what is on an image, or answers what `prompt` asks about it.
    ///
    /// # Errors
    /// As for [`ModelHandle::generate`]; no place of the model sees, or the image cannot be read.
    ///
    /// # Cancel safety
    /// As for [`ModelHandle::generate`].
    pub async fn describe(
        &self,
        image: Image,
        prompt: &str,
        options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        let message = Message::user(prompt).with_images(vec![image]);
        self.generate(GenerateRequest::chat(vec![message]), options).await
    }

    /// Writes down what is said in audio. Returns with the first text, as [`ModelHandle::generate`] does.
    ///
    /// # Errors
    /// As for [`ModelHandle::generate`]; no place of the model can do it, the audio cannot be read, or there is nothing in
    /// it to transcribe.
    ///
    /// # Cancel safety
    /// As for [`ModelHandle::generate`].
    pub async fn transcribe(
        &self,
        request: TranscribeRequest,
        options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        let metrics = self.inner.shared.metrics.of_model(&self.model);
        let mut walk = self.walk(Capability::Transcribe, None, options)?;
        let asks = Asks::Transcribe(request);
        let started = walk.ask(|attempt| Started::at(attempt, asks.clone())).await?;
        Ok(Box::pin(Answering::new(self.model.clone(), metrics, started, None)))
    }

    /// Says a text again in another tone, in its own language.
    ///
    /// # Errors
    /// As for [`ModelHandle::generate`].
    ///
    /// # Cancel safety
    /// As for [`ModelHandle::generate`].
    pub async fn modulate(
        &self,
        text: &str,
        tone: &Tone,
        options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        self.generate(tone.request(text), options).await
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
        let embed = |Attempt { model, lease, provenance, .. }| {
            let texts = texts.clone();
            async move {
                let embeddings = model.embed(texts).await.map_err(|cause| lease.noted(cause))?;
                Ok((embeddings, provenance))
            }
        };
        self.walk(Capability::Embed, None, options)?.ask(embed).await
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
        let classify = |Attempt { model, lease, provenance, .. }| {
            let text = text.clone();
            async move {
                let scores = model.classify(text).await.map_err(|cause| lease.noted(cause))?;
                Ok((scores, provenance))
            }
        };
        self.walk(Capability::Classify, None, options)?.ask(classify).await
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
        let rerank = |Attempt { model, lease, provenance, .. }| {
            let (query, documents) = (query.clone(), documents.clone());
            async move {
                let scores = model.rerank(query, documents).await.map_err(|cause| lease.noted(cause))?;
                Ok((scores, provenance))
            }
        };
        self.walk(Capability::Rerank, None, options)?.ask(rerank).await
    }

    fn walk(
        &self,
        capability: Capability,
        conversation: Option<u64>,
        options: CallOptions,
    ) -> Result<Walk, Error> {
        Walk::new(&self.inner, &self.model, capability, conversation, options)
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

    async fn transcribe(
        &self,
        model: &ModelName,
        request: TranscribeRequest,
        options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        self.handle(model.as_str())?.transcribe(request, options).await
    }

    async fn can_fit(&self, model: &ModelName) -> Result<(), Error> {
        let mut refused = None;
        for place in self.plan(&[model.as_str()]).await? {
            match place.refuse {
                Some(error @ Error::OverBudget { .. }) => refused = refused.or(Some(error)),
                _ => return Ok(()),
            }
        }
        refused.map_or(Ok(()), Err)
    }

    async fn prepare(&self, model: &ModelName) {
        if let Err(error) = self.load_ahead(model.as_str()).await {
            tracing::debug!(%model, %error, "it was not made ready before it is asked");
        }
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

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use sarai_core::backend::ServedBy;
use sarai_core::request::{Capabilities, Capability, Delta, Embeddings, GenerateRequest, TranscribeRequest};
use sarai_core::units::HostName;
use tokio::sync::Semaphore;

use crate::Error;

/// An answer as a host sends it: any number of texts, then one end or one error.
pub type Deltas = BoxStream<'static, Result<Delta, Error>>;

/// What a host that runs models can do, in whatever protocol.
#[async_trait]
pub trait HostApi: fmt::Debug + Send + Sync + 'static {
    /// Its name in the configuration.
    fn name(&self) -> &HostName;

    /// Who it is.
    fn served_by(&self) -> ServedBy;

    /// Its places: requests that may run on it at once, of all models. Hosts queue without bound, so the bound is here.
    fn places(&self) -> &Arc<Semaphore>;

    /// How many places there are.
    fn parallel(&self) -> usize;

    /// Whether it holds the model in memory, where that is known.
    fn resident(&self, model: &str) -> Option<bool>;

    /// What its protocol has words for, of a model that generates. Whether the model there can do it, only asking tells.
    fn capabilities(&self) -> Capabilities;

    /// Writes down what is said in audio.
    ///
    /// # Errors
    /// Its protocol has no words for it, or anything that goes wrong before the host answers.
    ///
    /// # Cancel safety
    /// As for [`HostApi::generate`].
    async fn transcribe(&self, _model: &str, _request: &TranscribeRequest) -> Result<Deltas, Error> {
        Err(Error::HostCannot { host: self.name().clone(), what: Capability::Transcribe })
    }

    /// Continues a prompt. The stream's first item has come when it returns, or is known to come.
    ///
    /// # Errors
    /// Anything that goes wrong before the host begins to answer; later failures come in the stream.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future or the stream closes the connection, which is how the host is told.
    async fn generate(
        &self,
        model: &str,
        n_ctx: Option<u32>,
        request: &GenerateRequest,
    ) -> Result<Deltas, Error>;

    /// Embeds texts; each vector is brought to length 1.
    ///
    /// # Errors
    /// The host cannot be reached, does not have the model, refuses a text, or answers with another number of vectors.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn embed(&self, model: &str, n_ctx: Option<u32>, texts: &[String]) -> Result<Embeddings, Error>;

    /// Has it free a model's memory, and waits until it has; returns whether its protocol can. Its file stays.
    ///
    /// # Errors
    /// The host cannot be reached, does not know the model, or still holds it after 15 s.
    ///
    /// # Cancel safety
    /// Cancel safe: the host may or may not have got the request.
    async fn unload(&self, model: &str) -> Result<bool, Error>;

    /// The names of the models that it has, loaded or not.
    ///
    /// # Errors
    /// The host cannot be reached or answers with something else.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn has(&self) -> Result<Vec<String>, Error>;

    /// What to do for a model that it does not have, as a command or a hint.
    fn how_to_get(&self, model: &str) -> String;
}

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::StreamExt;
use lru::LruCache;
use sarai_core::backend::{Asked, Backend, Host, HostState, Hosts, LoadRequest, Model, ServedBy};
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::{Estimate, Footprint, Freed};
use sarai_core::request::{
    Capabilities, Capability, Embeddings, GenerateRequest, TokenStream, TranscribeRequest,
};
use sarai_core::units::Bytes;
use tokio::time::Instant;

use super::api::HostApi;
use super::breaker::Admission;
use super::choice::choose;
use super::host_model::HostModel;
use super::seat::Seat;

/// Conversations whose host is remembered.
const CONVERSATIONS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1023);

/// One model on one or several hosts. It takes none of this process's memory; a host loads it when it is first asked.
///
/// The host is chosen for each request: one that has a place free before one that is full, one that did not fail the last
/// time before one that did, the one that has the conversation, one that holds the model, the one with the fewest requests,
/// then the order in which they were given.
#[derive(Clone, Debug)]
pub struct RemoteBackend {
    place: Arc<Place>,
}

#[derive(Debug)]
pub(super) struct Place {
    purpose: Capability,
    pub(super) n_ctx: Option<u32>,
    seats: Vec<Arc<Seat>>,
    /// Which host answered a conversation last.
    conversations: Mutex<LruCache<u64, ServedBy>>,
}

impl RemoteBackend {
    /// A model on these hosts, with its name on each, in order of preference. `n_ctx` is the context length to ask for; `None`
    /// leaves it to the host. It is wanted for `purpose`: [`Capability::Generate`] or [`Capability::Embed`].
    #[must_use]
    pub fn new(
        hosts: impl IntoIterator<Item = (Arc<dyn HostApi>, String)>,
        n_ctx: Option<u32>,
        purpose: Capability,
    ) -> Self {
        let seats = hosts.into_iter().map(|(api, model)| Arc::new(Seat::new(api, model))).collect();
        let conversations = Mutex::new(LruCache::new(CONVERSATIONS));
        Self { place: Arc::new(Place { purpose, n_ctx, seats, conversations }) }
    }
}

#[async_trait]
impl Backend for RemoteBackend {
    fn served_by(&self) -> ServedBy {
        match self.place.seats.as_slice() {
            [only] => only.served_by(),
            several => ServedBy::OneOf(several.iter().map(|seat| seat.served_by()).collect()),
        }
    }

    fn capabilities(&self) -> Capabilities {
        let all = Capabilities::of(&[self.place.purpose]);
        if self.place.purpose != Capability::Generate {
            return all;
        }
        // What one of the hosts can; another one passes the request on.
        let can = |one: &Capability| self.place.seats.iter().any(|seat| seat.api.capabilities().has(*one));
        Capability::ALL.into_iter().filter(can).fold(all, Capabilities::with)
    }

    fn parallel(&self) -> usize {
        self.place.seats.iter().map(|seat| seat.api.parallel()).sum()
    }

    async fn estimate(&self, _available: Bytes) -> Result<Estimate, Failure> {
        Ok(Estimate::default())
    }

    async fn load(&self, request: LoadRequest) -> Result<Arc<dyn Model>, Failure> {
        for seat in &self.place.seats {
            seat.report_to(Arc::clone(&request.hosts));
        }
        Ok(Arc::new(self.clone()))
    }

    fn hosts(&self) -> Option<&dyn Hosts> {
        Some(self)
    }

    fn available(&self) -> Result<(), Failure> {
        let now = Instant::now();
        let admits = |seat: &Arc<Seat>| !matches!(seat.admission(now), Admission::Not(_));
        match self.place.seats.first() {
            Some(first) if !self.place.seats.iter().any(admits) => Err(first.left_alone(now)),
            _ => Ok(()),
        }
    }

    async fn unload_on_hosts(&self) -> Result<Vec<ServedBy>, Failure> {
        let mut freed = Vec::new();
        for seat in &self.place.seats {
            if seat.api.unload(&seat.model).await? {
                freed.push(seat.served_by());
            }
        }
        Ok(freed)
    }
}

/// The model as whoever holds a lease asks it: each request goes to the first choice among the hosts that have words for it.
#[async_trait]
impl Model for RemoteBackend {
    fn n_ctx(&self) -> Option<u32> {
        self.place.n_ctx
    }

    fn memory(&self) -> Option<Footprint> {
        Some(Footprint::NONE)
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, Failure> {
        let host = self.any(request.conversation(), request.capability()).await?;
        let tokens = host.model.generate(request).await?;
        // The host's place is free when the stream is dropped.
        Ok(tokens.inspect(move |_| _ = &host).boxed())
    }

    async fn transcribe(&self, request: TranscribeRequest) -> Result<TokenStream, Failure> {
        let host = self.any(None, Capability::Transcribe).await?;
        let tokens = host.model.transcribe(request).await?;
        Ok(tokens.inspect(move |_| _ = &host).boxed())
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embeddings, Failure> {
        self.any(None, Capability::Embed).await?.model.embed(texts).await
    }

    async fn unload(&self) -> Option<Freed> {
        None
    }
}

#[async_trait]
impl Hosts for RemoteBackend {
    async fn next(&self, asked: Asked<'_>) -> Result<Option<Host>, Failure> {
        let left = |seat: &&Arc<Seat>| !asked.failed.contains(&seat.served_by());
        let left: Vec<&Arc<Seat>> = self.place.seats.iter().filter(left).collect();
        if left.is_empty() {
            return Ok(None);
        }
        let known = asked.conversation.and_then(|conversation| self.place.known(conversation));
        let (seat, permit) = loop {
            let now = Instant::now();
            let admits = |seat: &&Arc<Seat>| !matches!(seat.admission(now), Admission::Not(_));
            let admitted: Vec<&Arc<Seat>> = left.iter().copied().filter(admits).collect();
            if admitted.is_empty() && !asked.last_resort {
                return Err(left[0].left_alone(now));
            }
            let forced = admitted.is_empty();
            let chosen = choose(if forced { left.clone() } else { admitted }, known.as_ref()).await?;
            // It may have failed others while this one waited.
            if forced || !matches!(chosen.0.admission(Instant::now()), Admission::Not(_)) {
                break chosen;
            }
        };
        let model = HostModel { place: Arc::clone(&self.place), seat, _permit: permit };
        Ok(Some(Host { served_by: model.seat.served_by(), model: Arc::new(model) }))
    }

    fn states(&self) -> Vec<HostState> {
        let now = Instant::now();
        self.place.seats.iter().map(|seat| seat.state(now)).collect()
    }
}

impl RemoteBackend {
    /// The first choice among the hosts whose protocol has words for what is wanted; where none has, the one that is chosen
    /// says so.
    async fn any(&self, conversation: Option<u64>, wanted: Capability) -> Result<Host, Failure> {
        let seats = &self.place.seats;
        let cannot = seats.iter().filter(|seat| !seat.api.capabilities().has(wanted));
        let mut cannot: Vec<ServedBy> = cannot.map(|seat| seat.served_by()).collect();
        if cannot.len() == seats.len() {
            cannot.clear();
        }
        let asked = Asked { conversation, failed: &cannot, last_resort: true };
        let none = || Failure::new(FailureKind::Unreachable, "the model has no host");
        self.next(asked).await?.ok_or_else(none)
    }
}

impl Place {
    fn known(&self, conversation: u64) -> Option<ServedBy> {
        self.conversations.lock().unwrap_or_else(PoisonError::into_inner).get(&conversation).cloned()
    }

    pub(super) fn remember(&self, conversation: u64, host: ServedBy) {
        self.conversations.lock().unwrap_or_else(PoisonError::into_inner).put(conversation, host);
    }
}

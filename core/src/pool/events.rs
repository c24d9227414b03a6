use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use crate::backend::{Breaker, ServedBy};
use crate::scheduler::Change;
use crate::units::ModelName;

/// Something that changed in the pool.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PoolEvent {
    /// A slot changed its state.
    Slot(Change),
    /// A load has come so far.
    LoadProgress {
        /// The model.
        model: ModelName,
        /// From 0 to 100.
        percent: u32,
    },
    /// A request goes on to the next place of its model.
    Fallback {
        /// The model.
        model: ModelName,
        /// The place that failed.
        from: ServedBy,
        /// The place that is tried now.
        to: ServedBy,
        /// Why.
        reason: String,
    },
    /// A host is given up for a model for a while, or asked again.
    Breaker {
        /// The model.
        model: ModelName,
        /// The host.
        host: ServedBy,
        /// What holds from now on.
        breaker: Breaker,
        /// The failure that brought it about, if one did.
        cause: Option<String>,
    },
    /// The reader was too slow and missed so many events.
    Missed(u64),
}

/// The pool's changes as they come; ends with the pool.
#[derive(Debug)]
pub struct PoolEvents {
    events: BroadcastStream<PoolEvent>,
}

impl PoolEvents {
    pub(super) fn new(events: broadcast::Receiver<PoolEvent>) -> Self {
        Self { events: BroadcastStream::new(events) }
    }
}

impl Stream for PoolEvents {
    type Item = PoolEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<PoolEvent>> {
        Pin::new(&mut self.events).poll_next(cx).map(|next| {
            next.map(|event| event.unwrap_or_else(|BroadcastStreamRecvError::Lagged(n)| PoolEvent::Missed(n)))
        })
    }
}

//! Which host is asked.

use std::sync::Arc;

use futures::future::select_all;
use sarai_core::backend::ServedBy;
use sarai_core::failure::{Failure, FailureKind};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::seat::Seat;

/// The best of these with a place on it; where all are full, the first of them that has one again. The wait is the caller's
/// to bound.
///
/// # Cancel safety
/// Cancel safe: no place is held.
pub(super) async fn choose(
    mut candidates: Vec<&Arc<Seat>>,
    known: Option<&ServedBy>,
) -> Result<(Arc<Seat>, OwnedSemaphorePermit), Failure> {
    candidates.sort_by_cached_key(|seat| order(seat, known));
    for seat in &candidates {
        if let Ok(permit) = Arc::clone(seat.api.places()).try_acquire_owned() {
            return Ok((Arc::clone(seat), permit));
        }
    }
    let waiting = candidates.into_iter().map(|seat| {
        Box::pin(async move { (Arc::clone(seat), Arc::clone(seat.api.places()).acquire_owned().await) })
    });
    let ((seat, permit), _, _) = select_all(waiting).await;
    let closed = |error| Failure::new(FailureKind::Unreachable, error);
    Ok((seat, permit.map_err(closed)?))
}

/// Smallest first; equal ones stay in the order in which they were given.
fn order(seat: &Seat, known: Option<&ServedBy>) -> (bool, bool, bool, bool, usize) {
    let has_conversation = known.is_some_and(|known| *known == seat.served_by());
    let resident = seat.api.resident(&seat.model) == Some(true);
    (seat.is_full(), seat.is_suspect(Instant::now()), !has_conversation, !resident, seat.in_flight())
}

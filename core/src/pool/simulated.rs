use std::time::Duration;

use serde::Serialize;

use super::ModelPool;
use super::driver::Command;
use crate::error::Error;
use crate::scheduler::{Eviction, SlotId};
use crate::simulate::{Arrival, Simulated, SimulatedSlot, simulate};
use crate::units::{Bytes, ModelName, Timestamp};

/// A request of a trace, to be played on a pool's models without loading any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedRequest {
    /// When it comes, from the start of the trace.
    pub at: Duration,
    /// The model that it asks.
    pub model: ModelName,
    /// How long it runs once its model is ready.
    pub runs: Duration,
}

/// How a trace is played.
#[derive(Clone, Copy, Debug)]
pub struct Replay {
    /// The budget; the pool's own if `None`.
    pub budget: Option<Bytes>,
    /// LLMs at once; the pool's own limit if `None`.
    pub max_concurrent_llms: Option<usize>,
    /// Who is evicted first.
    pub eviction: Eviction,
    /// For a model whose load was never measured: how long one takes for each GB (10⁹ bytes).
    pub load_time_per_gb: Duration,
}

/// What came of a trace, and what was assumed for it.
#[derive(Clone, Debug, Serialize)]
pub struct Replayed {
    /// The budget it was played with.
    pub budget_bytes: Bytes,
    /// Who was evicted first.
    pub eviction: Eviction,
    /// What came of it.
    #[serde(flatten)]
    pub simulated: Simulated,
    /// Models of the trace whose load time was not measured yet, so that it was assumed.
    pub assumed_load_times: Vec<ModelName>,
}

/// Joining the thread and giving memory back; see the pool's own measurements in `sarai_load_seconds`.
const UNLOAD: Duration = Duration::from_millis(100);

impl ModelPool {
    /// Plays a trace of requests on this pool's models, each at its first place, and says what would have come of it.
    /// Reads the files' headers; loads nothing.
    ///
    /// # Errors
    /// A model is unknown, or its size cannot be told.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn simulate(&self, trace: &[TracedRequest], replay: &Replay) -> Result<Replayed, Error> {
        let limits = self.inner.ask(|reply| Command::Limits { reply }).await?;
        let mut limits = limits.with_budget(replay.budget.unwrap_or(limits.budget));
        limits.max_concurrent_llms = replay.max_concurrent_llms.unwrap_or(limits.max_concurrent_llms);
        limits.max_waiting = usize::MAX;
        limits.eviction = replay.eviction;
        let mut assumed = Vec::new();
        let mut slots = Vec::new();
        let mut arrivals = Vec::new();
        // Only what the trace asks for: other files need not be there.
        let mut numbers: std::collections::BTreeMap<&ModelName, SlotId> = std::collections::BTreeMap::new();
        for request in trace {
            let slot = match numbers.get(&request.model) {
                Some(slot) => *slot,
                None => {
                    let (name, entry) = self.inner.entry(request.model.as_str())?;
                    let Some(first) = entry.chain.first() else { continue };
                    let unknown = |cause| Error::Load { model: name.clone(), cause };
                    let estimate =
                        self.inner.shared.estimate(*first, limits.budget).await.map_err(unknown)?;
                    let load = estimate.load_time.unwrap_or_else(|| {
                        if estimate.reserve() > Bytes::ZERO {
                            assumed.push(name.clone());
                        }
                        replay.load_time_per_gb.mul_f64(estimate.reserve().as_gb())
                    });
                    let spec = self.inner.specs[first.0].clone();
                    let slot = SlotId(slots.len());
                    slots.push(SimulatedSlot { spec, estimate, load, unload: UNLOAD });
                    numbers.insert(&request.model, slot);
                    slot
                }
            };
            arrivals.push(Arrival { at: Timestamp::new(request.at), slot, runs: request.runs });
        }
        let wait = self.inner.wait_timeout;
        let budget_bytes = limits.budget;
        let played = tokio::task::spawn_blocking(move || simulate(limits, &slots, &arrivals, wait)).await;
        let simulated = played.map_err(|_| Error::ShuttingDown)?;
        Ok(Replayed { budget_bytes, eviction: replay.eviction, simulated, assumed_load_times: assumed })
    }
}

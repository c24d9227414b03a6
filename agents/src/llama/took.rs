//! What a load took of memory and time, remembered for the next one of the same file with the same settings.

use std::time::Duration;

use sarai_core::memory::{Estimate, Footprint};
use sarai_core::units::Bytes;
use serde::{Deserialize, Serialize};

use super::record::{self, Record};
use super::{GgufSettings, weights};

/// The file's name in the folder of measurements.
const NAME: &str = "loads.json";

/// What is remembered of a load.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Took {
    /// The most that it ever took, where all its buffers were in use.
    bytes: Option<u64>,
    /// How long the last load took.
    load_ms: u64,
}

/// Completes an estimate by what the same load took before.
pub(super) fn complete(estimate: &mut Estimate, settings: &GgufSettings) {
    let Some(n_ctx) = estimate.n_ctx else { return };
    let took = Record::of(settings, NAME).and_then(|record| record.get::<Took>(&key(settings, n_ctx)?));
    if let Some(took) = took {
        estimate.measured_before = took.bytes.map(Bytes);
        estimate.load_time = Some(Duration::from_millis(took.load_ms));
    }
}

/// Remembers a load. `most` is what it held in the end; `None` where that is not known, or not all of its buffers were in
/// use.
pub(super) fn remember(settings: &GgufSettings, n_ctx: u32, most: Option<Footprint>, load_time: Duration) {
    let (Some(record), Some(key)) = (Record::of(settings, NAME), key(settings, n_ctx)) else { return };
    let before = record.get::<Took>(&key).and_then(|took| took.bytes);
    let now = most.and_then(|most| most.total()).map(|bytes| bytes.0);
    let load_ms = u64::try_from(load_time.as_millis()).unwrap_or(u64::MAX);
    record.put(key, Took { bytes: before.max(now), load_ms });
}

/// `None` while it is open how the weights are held.
fn key(settings: &GgufSettings, n_ctx: u32) -> Option<String> {
    let repacked = weights::repacked(settings)?;
    let GgufSettings { parallel, lora, .. } = settings;
    Some(format!("{} {n_ctx} {repacked} {parallel:?} {lora:?}", record::key(settings)))
}

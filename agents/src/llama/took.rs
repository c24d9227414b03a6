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
    /// How long the last load took; `None` where such a context was only made of another.
    load_ms: Option<u64>,
}

/// Completes an estimate by what the same load took before.
pub(super) fn complete(estimate: &mut Estimate, settings: &GgufSettings) {
    let Some(n_ctx) = estimate.n_ctx else { return };
    let took = Record::of(settings, NAME).and_then(|record| record.get::<Took>(&key(settings, n_ctx)?));
    if let Some(took) = took {
        estimate.measured_before = took.bytes.map(Bytes);
        estimate.spare = took.bytes.map_or(Bytes::ZERO, spare);
        estimate.load_time = took.load_ms.map(Duration::from_millis);
    }
}

/// Remembers a load. `most` is what it held in the end; `None` where that is not known, or not all of its buffers were in
/// use.
pub(super) fn remember(
    settings: &GgufSettings,
    n_ctx: u32,
    most: Option<Footprint>,
    load_time: Option<Duration>,
) {
    let (Some(record), Some(key)) = (Record::of(settings, NAME), key(settings, n_ctx)) else { return };
    let before = record.get::<Took>(&key);
    let now = most.and_then(|most| most.total()).map(|bytes| bytes.0);
    let load_ms = load_time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let took = Took {
        bytes: before.as_ref().and_then(|before| before.bytes).max(now),
        load_ms: load_ms.or(before.and_then(|before| before.load_ms)),
    };
    record.put(key, took);
}

/// What the next load may take more than this: measurements of one file differ by half a percent, and a process that has
/// loaded six models keeps 30 to 55 MB when they are gone.
fn spare(bytes: u64) -> Bytes {
    Bytes((8 << 20) + bytes / 128)
}

/// `None` while it is open how the weights are held.
fn key(settings: &GgufSettings, n_ctx: u32) -> Option<String> {
    let repacked = weights::repacked(settings)?;
    let GgufSettings { parallel, lora, kv_cache_type, .. } = settings;
    Some(format!("{} {n_ctx} {repacked} {kv_cache_type:?} {parallel:?} {lora:?}", record::key(settings)))
}

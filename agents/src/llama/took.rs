//! What loads took of memory and time, remembered for the next one of the same file with the same settings.
//!
//! The program around the pool allocates, too, and what it took or gave back during a load passes for the load's. So the
//! figures of the last five loads are kept, and the middle one counts. As long as there are fewer than three, the largest
//! does; but where that is more than the estimate, for an hour only: then the estimate counts, so that the model is loaded
//! and measured again. Nothing that happens during one load keeps a model out for good.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use sarai_core::memory::Estimate;
use sarai_core::units::Bytes;
use serde::{Deserialize, Serialize};

use super::record::{self, Record};
use super::{GgufSettings, weights};

/// The file's name in the folder of measurements.
const NAME: &str = "loads.json";
/// Figures that are kept of a load.
const KEPT: usize = 5;
/// As many as these confirm each other.
const CONFIRMED: usize = 3;
/// How long fewer than these count where they are more than the estimate.
const UNCONFIRMED: Duration = Duration::from_hours(1);

/// What is remembered of the loads of a file with a context.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Took {
    /// What the last ones took where all their buffers were in use, the latest last.
    bytes: Vec<u64>,
    /// When the latest of these was measured.
    measured: Option<SystemTime>,
    /// How long the last load took; `None` where such a context was only made of another.
    load_ms: Option<u64>,
}

impl Took {
    /// What of the figures counts beside an estimate.
    fn counts(&self, estimate: Bytes, now: SystemTime) -> Option<Bytes> {
        let mut bytes = self.bytes.clone();
        bytes.sort_unstable();
        let middle = Bytes(*bytes.get(bytes.len() / 2)?);
        let age = self.measured.and_then(|measured| now.duration_since(measured).ok());
        let stands =
            bytes.len() >= CONFIRMED || middle <= estimate || age.is_some_and(|age| age < UNCONFIRMED);
        stands.then_some(middle)
    }

    fn add(&mut self, bytes: Bytes, now: SystemTime) {
        self.bytes.push(bytes.0);
        let forgotten = self.bytes.len().saturating_sub(KEPT);
        self.bytes.drain(..forgotten);
        self.measured = Some(now);
    }
}

/// What is remembered of a file's loads, by context.
#[derive(Debug, Default)]
pub(super) struct Past {
    loads: BTreeMap<String, Took>,
    key: Option<String>,
}

impl Past {
    /// What is remembered now.
    pub(super) fn of(settings: &GgufSettings) -> Self {
        let loads = Record::of(settings, NAME).map(|record| record.read().into_iter().collect());
        Self { loads: loads.unwrap_or_default(), key: key(settings) }
    }

    /// Completes an estimate by what the same load took before.
    pub(super) fn complete(&self, estimate: Estimate) -> Estimate {
        let took = self.key.as_ref().zip(estimate.n_ctx);
        let Some(took) = took.and_then(|(key, n_ctx)| self.loads.get(&with_context(key, n_ctx))) else {
            return estimate;
        };
        // Whatever was given back meanwhile: the weights are there.
        let bytes = took.counts(estimate.total(), SystemTime::now()).map(|bytes| bytes.max(estimate.weights));
        Estimate {
            measured_before: bytes,
            spare: bytes.map_or(Bytes::ZERO, spare),
            load_time: took.load_ms.map(Duration::from_millis),
            ..estimate
        }
    }
}

/// Remembers a load. `bytes` is what it held in the end; `None` where that is not known, or not all of its buffers were in
/// use.
pub(super) fn remember(
    settings: &GgufSettings,
    n_ctx: u32,
    bytes: Option<Bytes>,
    load_time: Option<Duration>,
) {
    let (Some(record), Some(key)) = (Record::of(settings, NAME), key(settings)) else { return };
    if bytes.is_none() && load_time.is_none() {
        return;
    }
    record.change(with_context(&key, n_ctx), |before: Option<Took>| {
        let mut took = before.unwrap_or_default();
        if let Some(bytes) = bytes {
            took.add(bytes, SystemTime::now());
        }
        let load_ms = load_time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        Took { load_ms: load_ms.or(took.load_ms), ..took }
    });
}

/// What the next load may take more than this: measurements of one file differ by half a percent, and a process that has
/// loaded six models keeps 30 to 55 MB when they are gone.
fn spare(bytes: Bytes) -> Bytes {
    Bytes((8 << 20) + bytes.0 / 128)
}

/// `None` while it is open how the weights are held.
fn key(settings: &GgufSettings) -> Option<String> {
    let repacked = weights::repacked(settings)?;
    let GgufSettings { parallel, lora, kv_cache_type, mmproj, .. } = settings;
    let key = record::key(settings);
    Some(format!("{key} {repacked} {kv_cache_type:?} {parallel:?} {lora:?} {mmproj:?}"))
}

fn with_context(key: &str, n_ctx: u32) -> String {
    format!("{key} {n_ctx}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn took(bytes: &[u64]) -> Took {
        let mut took = Took::default();
        bytes.iter().for_each(|bytes| took.add(Bytes(*bytes), SystemTime::UNIX_EPOCH));
        took
    }

    fn counts(bytes: &[u64], age: Duration) -> Option<u64> {
        took(bytes).counts(Bytes(100), SystemTime::UNIX_EPOCH + age).map(|bytes| bytes.0)
    }

    #[test]
    fn one_disturbed_load_counts_for_an_hour_and_is_outvoted_by_those_that_follow() {
        assert_eq!(counts(&[900], Duration::ZERO), Some(900));
        assert_eq!(counts(&[900], HOUR), None, "the estimate counts, and the model is loaded again");
        assert_eq!(counts(&[900, 98], HOUR), None);
        assert_eq!(counts(&[900, 98, 99], HOUR), Some(99));
        assert_eq!(counts(&[98, 99, 98, 900], HOUR), Some(99));
        assert_eq!(counts(&[98, 99, 5, 98, 98], HOUR), Some(98), "one that gave memory back");
    }

    #[test]
    fn what_three_loads_took_counts_and_the_sixth_is_forgotten() {
        assert_eq!(counts(&[110, 111, 112], 1000 * HOUR), Some(111));
        assert_eq!(counts(&[900, 900, 900, 98, 98, 98], HOUR), Some(98));
        assert_eq!(took(&[1, 2, 3, 4, 5, 6]).bytes, [2, 3, 4, 5, 6]);
    }

    #[test]
    fn less_than_the_estimate_counts_at_once_and_for_good() {
        assert_eq!((counts(&[90], 1000 * HOUR), counts(&[90, 80], 1000 * HOUR)), (Some(90), Some(90)));
        assert_eq!(counts(&[], Duration::ZERO), None);
        let ahead = took(&[900]).counts(Bytes(100), SystemTime::UNIX_EPOCH - HOUR);
        assert_eq!(ahead, None, "a clock that was set back does not prolong anything");
    }
}

//! `memory:`, `queue:` and `metrics:`.

use std::net::SocketAddr;
use std::time::Duration;

use super::at::At;
use super::check::Check;
use super::domain::{Budget, MemoryConfig, MetricsConfig, QueueConfig, SessionsConfig, Strategy};
use super::field::Field;
use super::raw::{Preset, RawMemory, RawMetrics, RawQueue, RawSessions};
use super::sources::{Overrides, Source};
use super::values::Span;
use crate::scheduler::Eviction;
use crate::units::Bytes;

/// Each takes a place in the pool's channels.
const MOST_WAITING: usize = 1_000_000;

pub(super) fn memory(
    raw: Field<RawMemory>,
    at: &At<'_>,
    overrides: &Overrides,
    check: &mut Check<'_>,
) -> MemoryConfig {
    let raw = check.read(at, raw).unwrap_or_default();
    let budget = budget(raw.max_ram_gb, raw.preset, at, overrides, check);

    let at_llms = at.key("max_concurrent_llms");
    let variable = check.variable("MAX_CONCURRENT_LLMS", at_least_one, "a whole number from 1 up");
    let flag = overrides.max_concurrent_llms.map(|llms| (llms, Source::Flag("--max-concurrent-llms")));
    check.require_flag(
        flag.as_ref().is_none_or(|(llms, _)| *llms > 0),
        "--max-concurrent-llms",
        "must be 1 or more",
    );
    check.require(&at_llms, raw.max_concurrent_llms.given() != Some(&0), "must be 1 or more");
    let max_concurrent_llms = check.layered(&at_llms, raw.max_concurrent_llms, flag.or(variable), 3);

    MemoryConfig {
        budget,
        max_concurrent_llms,
        strategy: check.setting(&at.key("strategy"), raw.strategy, Strategy::default()),
        eviction: check.setting(&at.key("eviction"), raw.eviction, Eviction::default()),
        monitor_interval: positive(
            raw.monitor_interval,
            &at.key("monitor_interval"),
            Span::seconds(30),
            check,
        ),
        shared: check.setting(&at.key("shared"), raw.shared, false),
        restore: check.setting(&at.key("restore"), raw.restore, false),
    }
}

pub(super) fn queue(raw: Field<RawQueue>, at: &At<'_>, check: &mut Check<'_>) -> QueueConfig {
    let raw = check.read(at, raw).unwrap_or_default();
    let at_waiting = at.key("max_waiting");
    let max_waiting = check.setting(&at_waiting, raw.max_waiting, 256);
    check.require(&at_waiting, (1..=MOST_WAITING).contains(&max_waiting), "must be from 1 to 1000000");
    let wait_timeout = positive(raw.wait_timeout, &at.key("wait_timeout"), Span::seconds(300), check);
    QueueConfig { max_waiting, wait_timeout }
}

/// A relative folder is relative to the working directory: it is the program's, not the configuration's.
pub(super) fn sessions(raw: Field<RawSessions>, at: &At<'_>, check: &mut Check<'_>) -> SessionsConfig {
    let raw = check.read(at, raw).unwrap_or_default();
    let at_path = at.key("path");
    let path = check.optional(&at_path, raw.path);
    check.require(&at_path, path.as_ref().is_none_or(|path| !path.trim().is_empty()), "must not be empty");
    let at_size = at.key("max_gb");
    let gb = check.setting(&at_size, raw.max_gb, 2.0);
    check.require(&at_size, gb.is_finite() && gb >= 0.0, "must be a size in GB, or 0");
    SessionsConfig { path: path.map(Into::into), max_bytes: Bytes::from_gb(gb.max(0.0)) }
}

pub(super) fn metrics(raw: Field<RawMetrics>, at: &At<'_>, check: &mut Check<'_>) -> Option<MetricsConfig> {
    let raw = check.read(at, raw)?;
    let at = at.key("listen");
    if raw.listen.is_absent() {
        check.problem(&at, "missing: an address and port, such as 127.0.0.1:9464");
    }
    let text = check.optional(&at, raw.listen)?;
    let Ok(listen) = text.parse::<SocketAddr>() else {
        check.problem(&at, format!("{text:?} is not an address and port, such as 127.0.0.1:9464"));
        return None;
    };
    if !listen.ip().is_loopback() {
        check.warn(&at, "not a loopback address: whoever reaches this machine can read the metrics");
    }
    Some(MetricsConfig { listen })
}

/// A duration longer than nothing.
pub(super) fn positive(field: Field<Span>, at: &At<'_>, default: Span, check: &mut Check<'_>) -> Duration {
    let Span(duration) = check.setting(at, field, default);
    check.require(at, !duration.is_zero(), "must be longer than 0");
    duration
}

fn budget(
    max_ram_gb: Field<f64>,
    preset: Field<Preset>,
    at: &At<'_>,
    overrides: &Overrides,
    check: &mut Check<'_>,
) -> Budget {
    let (at_gb, at_preset) = (at.key("max_ram_gb"), at.key("preset"));
    if !max_ram_gb.is_absent() && !preset.is_absent() {
        check.problem(&at_preset, "not beside max_ram_gb: keep one of them");
    }
    let in_file = check.read(&at_gb, max_ram_gb);
    let preset = check.read(&at_preset, preset);
    check.require(&at_gb, in_file.is_none_or(is_size), "must be a size in GB above 0");

    let variable = check.variable(
        "SARAI_MAX_RAM_GB",
        |text| text.parse().ok().filter(|gb| is_size(*gb)),
        "a size in GB above 0",
    );
    let flag = overrides.max_ram_gb.map(|gb| (gb, Source::Flag("--max-ram-gb")));
    check.require_flag(
        overrides.max_ram_gb.is_none_or(is_size),
        "--max-ram-gb",
        "must be a size in GB above 0",
    );

    let (gb, source) = match (flag.or(variable), in_file, preset) {
        (Some(above), _, _) => above,
        (None, Some(gb), _) => (gb, check.source(&at_gb)),
        (None, None, Some(preset)) => {
            check.note(&at_preset, &preset, check.source(&at_preset));
            let Some(gb) = gigabytes(preset) else { return Budget::Auto };
            (gb, check.source(&at_preset))
        }
        (None, None, None) => (MEDIUM, Source::Default),
    };
    check.note(&at_gb, &gb, source);
    Budget::Of(Bytes::from_gb(gb))
}

impl From<Preset> for Budget {
    fn from(preset: Preset) -> Self {
        gigabytes(preset).map_or(Self::Auto, |gb| Self::Of(Bytes::from_gb(gb)))
    }
}

impl From<Bytes> for Budget {
    fn from(bytes: Bytes) -> Self {
        Self::Of(bytes)
    }
}

const MEDIUM: f64 = 6.0;

const fn gigabytes(preset: Preset) -> Option<f64> {
    match preset {
        Preset::Low => Some(2.0),
        Preset::Medium => Some(MEDIUM),
        Preset::High => Some(12.0),
        Preset::VeryHigh => Some(24.0),
        Preset::Auto => None,
    }
}

pub(super) fn is_size(gb: f64) -> bool {
    gb.is_finite() && gb > 0.0
}

fn at_least_one(text: &str) -> Option<usize> {
    text.parse().ok().filter(|n| *n > 0)
}

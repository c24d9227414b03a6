//! From the raw shapes to the configuration the program works with.

use std::collections::BTreeMap;

use super::at::At;
use super::check::Check;
use super::domain::Config;
use super::field::Field;
use super::models::Scope;
use super::raw::RawConfig;
use super::sources::Overrides;
use super::{hosts, limits, models, pipelines, tones};
use crate::units::BadName;

/// Checks `raw`, whose values stand at `at`. What has problems is left out of the result; `check` has them.
pub(super) fn config(
    raw: Field<RawConfig>,
    at: &At<'_>,
    overrides: &Overrides,
    check: &mut Check<'_>,
) -> Config {
    let raw = check.read(at, raw).unwrap_or_default();
    let memory = limits::memory(raw.memory, &at.key("memory"), overrides, check);
    let queue = limits::queue(raw.queue, &at.key("queue"), check);
    let sessions = limits::sessions(raw.sessions, &at.key("sessions"), check);
    let metrics = limits::metrics(raw.metrics, &at.key("metrics"), check);

    let at_hosts = at.key("hosts");
    let raw_hosts = check.read(&at_hosts, raw.hosts).unwrap_or_default();
    let at_models = at.key("models");
    let no_model = raw.models.is_absent() || raw.models.given().is_some_and(BTreeMap::is_empty);
    if no_model && raw_hosts.is_empty() {
        check.problem(&at_models, "missing: a configuration needs at least one model, or a host to look at");
    }
    let raw_models = check.read(&at_models, raw.models).unwrap_or_default();
    let scope = Scope::new(&raw_hosts, &raw_models, memory.strategy);
    let models = models::models(raw_models, &at_models, &scope, check);
    let implicit_is_used = models.uses_implicit_host();
    let hosts = hosts::hosts(raw_hosts, implicit_is_used, &at_hosts, check);

    let tones = tones::tones(raw.tones, &at.key("tones"), check);
    let pipelines = pipelines::pipelines(raw.pipelines, &at.key("pipelines"), (&scope, &tones), check);
    Config {
        hosts,
        models: models.by_name,
        router: models.router,
        memory,
        queue,
        sessions,
        metrics,
        tones,
        pipelines,
    }
}

/// The entries of a mapping from names, each with its place; notes names that are none.
pub(super) fn named<'a, N, T>(
    entries: BTreeMap<String, Field<T>>,
    at: &At<'a>,
    check: &mut Check<'_>,
) -> Vec<(N, T, At<'a>)>
where
    N: std::str::FromStr<Err = BadName>,
    T: Default,
{
    let mut out = Vec::new();
    for (name, field) in entries {
        let at = at.key(&name);
        // `name:` with nothing below it has every key at its default, or misses those it needs.
        let wrong = matches!(field, Field::Wrong(_));
        let value = check.read(&at, field).unwrap_or_default();
        match name.parse::<N>() {
            Ok(_) if wrong => {}
            Ok(name) => out.push((name, value, at)),
            Err(error) => check.problem(&at, error.to_string()),
        }
    }
    out
}

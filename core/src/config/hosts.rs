//! `hosts:`, and the host that models use when they name none.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::at::At;
use super::build::named;
use super::check::Check;
use super::domain::{HostConfig, HostKind};
use super::field::Field;
use super::limits::{is_size, positive};
use super::raw::RawHost;
use super::sources::Source;
use super::values::Span;
use crate::units::{ApiKey, Bytes, HostName};

/// A host that is not there does not come back within more tries than these; they follow each other at once.
const MOST_RETRIES: u32 = 10;
const MOST_PARALLEL: usize = 1000;

/// The host of models that name none.
pub(super) const IMPLICIT: &str = "ollama";

/// Where Ollama listens unless told otherwise.
const OLLAMA_DEFAULT_URL: &str = "http://127.0.0.1:11434";

/// The hosts of the file, and the implicit one if a model uses it.
pub(super) fn hosts(
    mut raw: BTreeMap<String, Field<RawHost>>,
    implicit_is_used: bool,
    at: &At<'_>,
    check: &mut Check<'_>,
) -> BTreeMap<HostName, HostConfig> {
    if implicit_is_used {
        raw.entry(IMPLICIT.to_owned()).or_default();
    }
    if raw.is_empty() {
        return BTreeMap::new();
    }
    let common = Common::read(check);
    let mut hosts = BTreeMap::new();
    for (name, raw, at) in named::<HostName, RawHost>(raw, at, check) {
        if let Some(host) = host(raw, name.as_str() == IMPLICIT, &at, &common, check) {
            hosts.insert(name, host);
        }
    }
    hosts
}

/// What variables say for all hosts.
struct Common {
    timeout: Option<(Span, Source)>,
    retries: Option<(u32, Source)>,
}

impl Common {
    fn read(check: &mut Check<'_>) -> Self {
        let seconds_or_span = |text: &str| {
            let span = text.parse().ok().map(Span::seconds).or_else(|| Span::parse(text));
            span.filter(|span| !span.0.is_zero())
        };
        Self {
            timeout: check.variable("OLLAMA_TIMEOUT", seconds_or_span, "a time, such as 30 or 30s"),
            retries: check.variable("OLLAMA_RETRIES", retries, "a whole number from 0 to 10"),
        }
    }
}

fn host(
    raw: RawHost,
    implicit: bool,
    at: &At<'_>,
    common: &Common,
    check: &mut Check<'_>,
) -> Option<HostConfig> {
    let kind = check.setting(&at.key("kind"), raw.kind, HostKind::default());
    let ollama = kind == HostKind::Ollama;
    for (key, given) in [
        ("max_ram_gb", !raw.max_ram_gb.is_absent()),
        ("watch", !raw.watch.is_absent()),
        ("watch_interval", !raw.watch_interval.is_absent()),
        ("keep_alive", !raw.keep_alive.is_absent()),
    ] {
        if given && !ollama {
            check.warn(&at.key(key), "no effect: the protocol of kind openai has no word for it");
        }
    }
    if ollama && !raw.continues.is_absent() {
        check.warn(&at.key("continues"), "no effect: a host of kind ollama always does");
    }
    let url = url(raw.url, implicit, kind, &at.key("url"), check);
    let api_key = api_key(raw.api_key_env, &at.key("api_key_env"), check);

    let at_ram = at.key("max_ram_gb");
    let max_ram_gb = check.optional(&at_ram, raw.max_ram_gb);
    check.require(&at_ram, max_ram_gb.is_none_or(is_size), "must be a size in GB above 0");
    let at_parallel = at.key("parallel");
    let parallel = check.setting(&at_parallel, raw.parallel, 1);
    check.require(&at_parallel, (1..=MOST_PARALLEL).contains(&parallel), "must be from 1 to 1000");

    let here = url.as_deref().is_some_and(is_loopback);
    let watch = check.setting(&at.key("watch"), raw.watch, ollama && (max_ram_gb.is_some() || here));
    let interval = positive(raw.watch_interval, &at.key("watch_interval"), Span::seconds(30), check);
    check.require(
        &at.key("watch"),
        watch || max_ram_gb.is_none() || !ollama,
        "a host that is not watched cannot have max_ram_gb: leave one of them out",
    );

    let (first_token_timeout, total_timeout) =
        timeouts(raw.first_token_timeout, raw.total_timeout, common.timeout.as_ref(), at, check);
    let connect_timeout = positive(raw.connect_timeout, &at.key("connect_timeout"), Span::seconds(1), check);
    let load_timeout = positive(raw.load_timeout, &at.key("load_timeout"), Span::seconds(180), check);
    let stall_timeout = positive(raw.stall_timeout, &at.key("stall_timeout"), Span::seconds(30), check);
    let at_retries = at.key("retries");
    check.require(&at_retries, raw.retries.given().is_none_or(|n| *n <= MOST_RETRIES), "must be 10 or less");
    let retries = check.layered(&at_retries, raw.retries, common.retries.clone(), 1);
    let Span(keep_alive) = check.setting(&at.key("keep_alive"), raw.keep_alive, Span::seconds(300));
    // Only now: a host without an address has its other keys checked too.
    Some(HostConfig {
        kind,
        url: url?,
        api_key,
        max_ram: max_ram_gb.filter(|_| ollama).map(Bytes::from_gb),
        watch_interval: (watch && ollama).then_some(interval),
        connect_timeout,
        first_token_timeout,
        load_timeout,
        stall_timeout,
        total_timeout,
        retries,
        parallel,
        keep_alive,
        continues: ollama || check.setting(&at.key("continues"), raw.continues, false),
    })
}

/// The key in the variable that is named. A variable that is not set is a problem: without its key the host would refuse
/// every request.
fn api_key(name: Field<String>, at: &At<'_>, check: &mut Check<'_>) -> Option<ApiKey> {
    let name = check.read(at, name)?;
    check.require(at, !name.trim().is_empty(), "must be the name of a variable");
    let Some((key, variable)) = check.env.get(name.trim()) else {
        check.problem(at, format!("the variable {name} is not set, neither in the environment nor in .env"));
        return None;
    };
    let key = key.trim();
    if !key.chars().all(|c| c.is_ascii_graphic()) {
        check.problem(at, format!("the key in {name} has characters that no HTTP header can have"));
        return None;
    }
    // The variable's name is no secret, what it holds is.
    check.note(at, &name, Source::Variable(variable));
    Some(ApiKey::new(key.to_owned()))
}

/// Whether an address that was found good is this machine's own.
fn is_loopback(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, authority)| authority);
    let host = split_port(authority).map_or(authority, |(host, _)| host);
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback() || address.is_unspecified())
}

/// The timeouts for the first token and for the whole. A first token's that is not given never exceeds the whole's.
fn timeouts(
    first_token: Field<Span>,
    total: Field<Span>,
    variable: Option<&(Span, Source)>,
    at: &At<'_>,
    check: &mut Check<'_>,
) -> (Duration, Duration) {
    let (at_first, at_total) = (at.key("first_token_timeout"), at.key("total_timeout"));
    let Span(total) = check.layered(&at_total, total, variable.cloned(), Span::seconds(600));
    check.require(&at_total, !total.is_zero(), "must be longer than 0");
    let default = Span(total.min(Duration::from_secs(120)));
    let Span(first) = check.layered(&at_first, first_token, variable.cloned(), default);
    check.require(&at_first, total.is_zero() || !first.is_zero(), "must be longer than 0");
    check.require(&at_first, first <= total, "must not be longer than total_timeout");
    (first, total)
}

/// The host's address. The implicit host has one even where the file gives none.
fn url(
    field: Field<String>,
    implicit: bool,
    kind: HostKind,
    at: &At<'_>,
    check: &mut Check<'_>,
) -> Option<String> {
    let missing = field.is_absent();
    if missing && !implicit {
        check.problem(at, "missing: the host's address, such as http://127.0.0.1:11434");
        return None;
    }
    if missing {
        let (given, source) = match check.env.get("OLLAMA_BASE_URL") {
            Some((url, variable)) => (url, Source::Variable(variable)),
            None => (OLLAMA_DEFAULT_URL, Source::Default),
        };
        return match base_url(given) {
            Ok(url) => {
                check.note(at, &url, source);
                Some(url)
            }
            Err(message) => {
                check.problem_at("OLLAMA_BASE_URL".to_owned(), None, message);
                None
            }
        };
    }
    let given = check.read(at, field)?;
    let given = given.trim().trim_end_matches('/');
    // Where other programs write it so.
    let given = if kind == HostKind::Openai { given.strip_suffix("/v1").unwrap_or(given) } else { given };
    match base_url(given) {
        Ok(url) => {
            check.note(at, &url, check.source(at));
            Some(url)
        }
        Err(message) => {
            check.problem(at, message);
            None
        }
    }
}

/// A base address without its last slash. The messages never show it: it may hold a password.
fn base_url(given: &str) -> Result<String, &'static str> {
    let given = given.trim();
    if given.contains('@') {
        return Err("must not hold a user name or password");
    }
    let (scheme, rest) = given.split_once("://").unwrap_or(("", given));
    let scheme = scheme.to_ascii_lowercase();
    if !matches!(scheme.as_str(), "http" | "https") {
        return Err("must begin with http:// or https://");
    }
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#', '\\']) {
        return Err("must end after the host and port: no path, query or fragment");
    }
    let (host, port) = split_port(authority)?;
    if !is_host(host) {
        return Err("has no valid host name or address");
    }
    if port.is_some_and(|port| port.parse::<u16>().map_or(true, |port| port == 0)) {
        return Err("has a port that is not a number from 1 to 65535");
    }
    Ok(format!("{scheme}://{authority}"))
}

fn split_port(authority: &str) -> Result<(&str, Option<&str>), &'static str> {
    let Some(end) = authority.rfind(']') else {
        return Ok(authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))));
    };
    let (host, rest) = authority.split_at(end + 1);
    match rest.strip_prefix(':') {
        Some(port) => Ok((host, Some(port))),
        None if rest.is_empty() => Ok((host, None)),
        None => Err("has no valid host name or address"),
    }
}

fn is_host(host: &str) -> bool {
    if let Some(address) = host.strip_prefix('[') {
        return address.strip_suffix(']').is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    }
    !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

fn retries(text: &str) -> Option<u32> {
    text.parse().ok().filter(|retries| *retries <= MOST_RETRIES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_address_is_a_scheme_a_host_and_perhaps_a_port() {
        for (given, kept) in [
            ("http://127.0.0.1:11434", "http://127.0.0.1:11434"),
            ("HTTPS://models.lan/", "https://models.lan"),
            ("http://[::1]:80", "http://[::1]:80"),
        ] {
            assert_eq!(base_url(given).as_deref(), Ok(kept));
        }
        let bad = [
            "",
            "localhost:11434",
            "ftp://h",
            "http://",
            "http://h:0",
            "http://h:x",
            "http://h:70000",
            "http://h/api",
            "http://h?x=1",
            "http://a b",
            "http://[::1",
            "http://[::1]x",
            "http://:80",
        ];
        for given in bad {
            assert!(base_url(given).is_err(), "{given}");
        }
    }

    #[test]
    fn a_refused_address_is_never_shown() {
        let message = base_url("http://me:hunter2@host").expect_err("user names are refused");
        assert!(!message.contains("hunter2"));
    }
}

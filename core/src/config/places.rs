//! Where a model can run: its backend and its fallbacks, on hosts and from files.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::at::At;
use super::check::{Check, did_you_mean};
use super::domain::{
    Context, GgufConfig, HostKind, KvCacheType, ModelRole, OnHost, Place, Strategy, Weights,
};
use super::field::Field;
use super::hosts::IMPLICIT;
use super::models::Scope;
use super::raw::{RawBackend, RawModel};
use super::sources::Source;
use super::values::{HostModels, Names, RawContext, Span};
use crate::units::ModelName;

/// The name of [`RawBackend::GgufNative`] among fallbacks.
pub(super) const GGUF: &str = "gguf_native";

/// The name of [`RawBackend::OllamaHttp`] among fallbacks.
pub(super) const OLLAMA: &str = "ollama_http";

/// The name of [`RawBackend::OpenaiHttp`] among fallbacks.
pub(super) const OPENAI: &str = "openai_http";

/// The model that SOLAR_MODEL_NAME and SOLAR_PREFER_HTTP speak of.
const SOLAR: &str = "solar";

/// Bounds of a context length that is chosen at load, where the file gives none: the ends of the scale by free
/// memory.
const AUTO_CONTEXT: (u32, u32) = (1000, 8000);
/// Each takes a sequence of the context.
const MOST_PARALLEL: usize = 64;

/// What SOLAR_PREFER_HTTP says, where it is set.
#[derive(Debug)]
pub(super) struct Switch(Option<(bool, Source)>);

impl Switch {
    pub(super) fn read(check: &mut Check<'_>) -> Self {
        let parse = |text: &str| match text.to_ascii_lowercase().as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        };
        Self(check.variable("SOLAR_PREFER_HTTP", parse, "true, false, 1 or 0"))
    }
}

/// The places of a model, first choice first. Empty if there is none, which is noted.
pub(super) fn places(
    name: &ModelName,
    role: ModelRole,
    raw: RawModel,
    at: &At<'_>,
    (scope, switch): (&Scope, &Switch),
    check: &mut Check<'_>,
) -> Vec<Place> {
    let choices = choices(&raw, role, name, at, scope, check);
    let kinds: Vec<HostKind> = choices.iter().filter_map(Choice::host_kind).collect();
    let on_host = !kinds.is_empty();
    let from_file = choices.contains(&Choice::Gguf);
    note_unused(&raw, (on_host, from_file), at, check);

    let context = context(raw.context, &at.key("context"), check);
    let hosts = on_host.then(|| OnHosts::read(name, raw.host, raw.host_model, &kinds, at, (scope, check)));
    let at_mmproj = at.key("mmproj");
    let mmproj = check.optional(&at_mmproj, raw.mmproj);
    let is_empty = mmproj.as_deref().is_some_and(|path| path.trim().is_empty());
    check.require(&at_mmproj, !is_empty, "must not be empty");
    let at_projector_ttl = at.key("projector_ttl");
    let projector_ttl = check.optional(&at_projector_ttl, raw.projector_ttl).map(|Span(ttl)| ttl);
    if projector_ttl.is_some() && mmproj.is_none() {
        check.warn(&at_projector_ttl, "no effect: the model has no mmproj");
    }
    let gguf = from_file.then(|| GgufConfig {
        path: model_file(name, raw.path, at, check),
        context,
        weights: check.setting(&at.key("weights"), raw.weights, Weights::default()),
        kv_cache_type: check.setting(&at.key("kv_cache_type"), raw.kv_cache_type, KvCacheType::default()),
        threads: threads(raw.threads, &at.key("threads"), check),
        parallel: parallel(raw.parallel, &at.key("parallel"), check),
        lora: lora(raw.lora, &at.key("lora"), check),
        projector_ttl,
        mmproj: mmproj.filter(|_| !is_empty).map(|path| found(&path, check)),
    });

    let mut places = Vec::new();
    for choice in &choices {
        match choice {
            Choice::Gguf => places.extend(gguf.clone().map(Place::Gguf)),
            Choice::Hosts(kind) => {
                places.extend(hosts.iter().filter_map(|hosts| hosts.place(*kind, context)))
            }
            Choice::Model(model) => places.push(Place::Model(model.clone())),
        }
    }
    let at_backend = at.key("backend");
    let source = prefer(name, &mut places, switch).unwrap_or_else(|| check.source(&at_backend));
    let had_places = !places.is_empty();
    restrict(&mut places, scope.strategy);
    let Some(first) = places.iter().position(|place| !matches!(place, Place::Model(_))) else {
        if had_places && scope.strategy == Strategy::GgufOnly {
            let message = format!(
                "memory.strategy gguf_only leaves it no place of its own; add `fallback: {GGUF}`, or change the strategy"
            );
            check.problem(&at_backend, message);
        }
        // Otherwise its backend or its hosts have a problem, which is noted.
        return Vec::new();
    };
    // Another model never comes first.
    places[..=first].rotate_right(1);
    check.note(&at.key("places"), &places.iter().map(shown).collect::<Vec<_>>(), source);
    places
}

/// One entry of a model's order: its backend, then its fallbacks.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    Gguf,
    Hosts(HostKind),
    Model(ModelName),
}

impl Choice {
    const fn host_kind(&self) -> Option<HostKind> {
        match self {
            Self::Hosts(kind) => Some(*kind),
            Self::Gguf | Self::Model(_) => None,
        }
    }
}

fn choices(
    raw: &RawModel,
    role: ModelRole,
    name: &ModelName,
    at: &At<'_>,
    scope: &Scope,
    check: &mut Check<'_>,
) -> Vec<Choice> {
    let at_backend = at.key("backend");
    if raw.backend.is_absent() {
        check.problem(
            &at_backend,
            format!("missing: write `backend: {GGUF}`, `backend: {OLLAMA}` or `backend: {OPENAI}`"),
        );
    }
    let mut choices = Vec::new();
    choices.extend(check.optional(&at_backend, raw.backend.clone()).map(|backend| match backend {
        RawBackend::GgufNative => Choice::Gguf,
        RawBackend::OllamaHttp => Choice::Hosts(HostKind::Ollama),
        RawBackend::OpenaiHttp => Choice::Hosts(HostKind::Openai),
    }));
    let at_fallback = at.key("fallback");
    let fallback = check.optional(&at_fallback, raw.fallback.clone());
    for (index, given) in fallback.iter().flat_map(Names::as_slice).enumerate() {
        let at = match fallback {
            Some(Names::Several(_)) => at_fallback.item(index),
            Some(Names::One(_)) | None => at_fallback.clone(),
        };
        let Some(choice) = fallback_choice(given, role, name, &at, scope, check) else { continue };
        if choices.contains(&choice) {
            check.problem(&at, format!("`{given}` is in its order already; remove it here"));
        } else {
            choices.push(choice);
        }
    }
    choices
}

fn fallback_choice(
    given: &str,
    role: ModelRole,
    name: &ModelName,
    at: &At<'_>,
    scope: &Scope,
    check: &mut Check<'_>,
) -> Option<Choice> {
    match given {
        GGUF => return Some(Choice::Gguf),
        OLLAMA => return Some(Choice::Hosts(HostKind::Ollama)),
        OPENAI => return Some(Choice::Hosts(HostKind::Openai)),
        _ => {}
    }
    if given == name.as_str() {
        check.problem(at, "a model cannot fall back to itself; for its file write gguf_native");
        return None;
    }
    if scope.models.contains_key(given) {
        return scope.model(given, role, at, check).map(Choice::Model);
    }
    let known = [GGUF, OLLAMA, OPENAI].into_iter().chain(scope.models.keys().map(String::as_str));
    let hint = did_you_mean(given, known);
    check.problem(at, format!("`{given}` is neither a backend nor a model{hint}"));
    None
}

/// Warns of keys that only a backend needs which this model does not have.
fn note_unused(raw: &RawModel, (on_host, from_file): (bool, bool), at: &At<'_>, check: &mut Check<'_>) {
    let of_hosts = [("host", !raw.host.is_absent()), ("host_model", !raw.host_model.is_absent())];
    let of_files = [
        ("path", !raw.path.is_absent()),
        ("mmproj", !raw.mmproj.is_absent()),
        ("projector_ttl", !raw.projector_ttl.is_absent()),
        ("weights", !raw.weights.is_absent()),
        ("kv_cache_type", !raw.kv_cache_type.is_absent()),
        ("threads", !raw.threads.is_absent()),
        ("parallel", !raw.parallel.is_absent()),
        ("lora", !raw.lora.is_absent()),
    ];
    let unused = |used: bool, backend| {
        move |(key, given): (&'static str, bool)| (given && !used).then_some((key, backend))
    };
    let keys = of_hosts.into_iter().filter_map(unused(on_host, OLLAMA));
    for (key, backend) in keys.chain(of_files.into_iter().filter_map(unused(from_file, GGUF))) {
        let message = format!("no effect: neither backend nor fallback is {backend}");
        check.warn(&at.key(key), message);
    }
}

/// The hosts of a model, and its name on each.
struct OnHosts {
    hosts: Vec<(HostKind, OnHost)>,
}

impl OnHosts {
    fn read(
        name: &ModelName,
        host: Field<Names>,
        host_model: Field<HostModels>,
        kinds: &[HostKind],
        at: &At<'_>,
        (scope, check): (&Scope, &mut Check<'_>),
    ) -> Self {
        let at_host = at.key("host");
        let implicit = kinds.contains(&HostKind::Ollama);
        if host.is_absent() && !implicit {
            check.problem(&at_host, format!("missing: backend {OPENAI} needs a host of kind openai"));
        } else if host.is_absent() && !scope.hosts.is_empty() && !scope.hosts.contains_key(IMPLICIT) {
            check.warn(
                &at_host,
                format!("names none of the hosts above, so it uses the host `{IMPLICIT}` of OLLAMA_BASE_URL"),
            );
        }
        let names = match host.is_absent() && !implicit {
            true => Names::Several(Vec::new()),
            false => check.setting(&at_host, host, Names::One(IMPLICIT.to_owned())),
        };
        let models = Self::models(name, host_model, names.as_slice(), at, check);
        let mut hosts: Vec<(HostKind, OnHost)> = Vec::new();
        for (index, given) in names.as_slice().iter().enumerate() {
            let at = match names {
                Names::Several(_) => at_host.item(index),
                Names::One(_) => at_host.clone(),
            };
            let kind =
                scope.hosts.get(given).copied().or_else(|| (given == IMPLICIT).then(HostKind::default));
            match (given.parse(), kind) {
                (Ok(host), Some(_)) if hosts.iter().any(|(_, on)| on.host == host) => {
                    check.problem(&at, format!("host `{given}` is named twice"));
                }
                (Ok(_), Some(kind)) if !kinds.contains(&kind) => {
                    let (is, needs) = (kind_name(kind), backend_of(kind));
                    check.problem(
                        &at,
                        format!(
                            "host `{given}` is of kind {is}, and neither backend nor fallback is {needs}"
                        ),
                    );
                }
                (Ok(host), Some(kind)) => {
                    let model = models.get(given).cloned().unwrap_or_else(|| name.to_string());
                    hosts.push((kind, OnHost { host, model }));
                }
                (Ok(_) | Err(_), _) => {
                    let hint = did_you_mean(given, scope.hosts.keys().map(String::as_str));
                    check.problem(&at, format!("unknown host `{given}`{hint}"));
                }
            }
        }
        check.require(&at_host, implicit || !names.as_slice().is_empty(), "names no host");
        Self { hosts }
    }

    /// The model's name on each of the hosts.
    fn models(
        name: &ModelName,
        field: Field<HostModels>,
        hosts: &[String],
        at: &At<'_>,
        check: &mut Check<'_>,
    ) -> BTreeMap<String, String> {
        let at_model = at.key("host_model");
        let variable = check.env.get("SOLAR_MODEL_NAME").filter(|_| name.as_str() == SOLAR);
        let above = variable
            .map(|(model, variable)| (HostModels::Same(model.to_owned()), Source::Variable(variable)));
        let given = check.layered(&at_model, field, above, HostModels::Same(name.to_string()));
        let models: BTreeMap<String, String> = match given {
            HostModels::Same(model) => hosts.iter().map(|host| (host.clone(), model.clone())).collect(),
            HostModels::ByHost(models) => {
                for host in models.keys().filter(|host| !hosts.contains(host)) {
                    let hint = did_you_mean(host, hosts.iter().map(String::as_str));
                    check.problem(&at_model.key(host), format!("`{host}` is none of its hosts{hint}"));
                }
                models
            }
        };
        let named = models.values().all(|model| !model.trim().is_empty());
        check.require(&at_model, named, "must not be empty");
        models
    }

    /// Those of one kind, as one place.
    fn place(&self, kind: HostKind, context: Context) -> Option<Place> {
        let n_ctx = match context {
            Context::Fixed(tokens) => Some(tokens),
            Context::Auto { .. } => None,
        };
        let hosts = self.hosts.iter().filter(|(of, _)| *of == kind).map(|(_, on)| on.clone());
        let hosts: Vec<OnHost> = hosts.collect();
        (!hosts.is_empty()).then_some(Place::Hosts { kind, hosts, n_ctx })
    }
}

const fn backend_of(kind: HostKind) -> &'static str {
    match kind {
        HostKind::Ollama => OLLAMA,
        HostKind::Openai => OPENAI,
    }
}

const fn kind_name(kind: HostKind) -> &'static str {
    match kind {
        HostKind::Ollama => "ollama",
        HostKind::Openai => "openai",
    }
}

/// The model's file.
fn model_file(name: &ModelName, field: Field<String>, at: &At<'_>, check: &mut Check<'_>) -> PathBuf {
    let at = at.key("path");
    let default = format!("models/{name}.gguf");
    let (given, source) = match check.read(&at, field) {
        Some(given) => (given, check.source(&at)),
        None => (default, Source::Default),
    };
    check.require(&at, !given.trim().is_empty(), "must not be empty");
    let path = found(&given, check);
    check.note(&at, &path, source);
    path
}

/// Beside the configuration if it is there, else in the working directory if it is there.
pub(super) fn found(given: &str, check: &Check<'_>) -> PathBuf {
    let beside = match check.file.and_then(Path::parent) {
        Some(folder) => beside_file(folder, Path::new(given)),
        None => PathBuf::from(given),
    };
    if !beside.exists() && Path::new(given).exists() { PathBuf::from(given) } else { beside }
}

/// `given` in `folder`, without the detour of `config/../models`. Where a folder is a link, `..` leads elsewhere than
/// its name says, so the detour stays.
fn beside_file(folder: &Path, given: &Path) -> PathBuf {
    let mut folder = folder.to_path_buf();
    let mut rest = given;
    while let Ok(below) = rest.strip_prefix("..")
        && matches!(folder.components().next_back(), Some(Component::Normal(_)))
        && !folder.is_symlink()
    {
        folder.pop();
        rest = below;
    }
    folder.join(rest)
}

fn context(field: Field<RawContext>, at: &At<'_>, check: &mut Check<'_>) -> Context {
    let (min, max) = AUTO_CONTEXT;
    let source = check.source(at);
    let context = match check.read(at, field) {
        None | Some(RawContext::Auto) => Context::Auto { min, max },
        Some(RawContext::Tokens(tokens)) => Context::Fixed(tokens),
        Some(RawContext::Bounds(bounds)) => {
            let given_min = check.read(&at.key("min"), bounds.min);
            let given_max = check.read(&at.key("max"), bounds.max);
            // A bound that is given alone moves the other one where it has to.
            Context::Auto {
                min: given_min.unwrap_or_else(|| min.min(given_max.unwrap_or(max))),
                max: given_max.unwrap_or_else(|| max.max(given_min.unwrap_or(min))),
            }
        }
    };
    match context {
        Context::Fixed(tokens) => {
            check.require(at, tokens > 0, "must be 1 token or more");
            check.note(at, &tokens, source);
        }
        Context::Auto { min, max } => {
            check.require(at, min > 0, "min must be 1 token or more");
            check.require(at, min <= max, "min must not be above max");
            check.note(at, &BTreeMap::from([("max", max), ("min", min)]), source);
        }
    }
    context
}

fn threads(field: Field<usize>, at: &At<'_>, check: &mut Check<'_>) -> Option<usize> {
    let threads = check.optional(at, field);
    check.require(at, threads != Some(0), "must be 1 or more");
    threads
}

fn parallel(field: Field<usize>, at: &At<'_>, check: &mut Check<'_>) -> Option<usize> {
    let parallel = check.optional(at, field);
    check.require(at, parallel.is_none_or(|n| (1..=MOST_PARALLEL).contains(&n)), "must be from 1 to 64");
    parallel
}

fn lora(
    field: Field<BTreeMap<String, Field<f64>>>,
    at: &At<'_>,
    check: &mut Check<'_>,
) -> Vec<(PathBuf, f32)> {
    let mut adapters = Vec::new();
    for (given, scale) in check.read(at, field).unwrap_or_default() {
        let at = at.key(&given);
        check.require(&at, !given.trim().is_empty(), "must be the path of an adapter");
        let scale = check.setting(&at, scale, 1.0);
        check.require(&at, scale.is_finite(), "must be a number");
        adapters.push((found(&given, check), scale as f32));
    }
    adapters
}

/// Puts the preferred backend of SOLAR first; the rest keeps its order. Says what decided, if anything did.
fn prefer(name: &ModelName, places: &mut [Place], switch: &Switch) -> Option<Source> {
    let (prefer_http, source) = switch.0.as_ref().filter(|_| name.as_str() == SOLAR)?;
    places.sort_by_key(|place| match place {
        Place::Hosts { .. } => !prefer_http,
        Place::Gguf(_) => *prefer_http,
        Place::Model(_) => true,
    });
    Some(source.clone())
}

fn restrict(places: &mut Vec<Place>, strategy: Strategy) {
    let is_host = |place: &Place| matches!(place, Place::Hosts { .. });
    match strategy {
        Strategy::HybridHttpGguf => {}
        Strategy::GgufOnly => places.retain(|place| !is_host(place)),
        Strategy::HttpOnly if places.iter().any(is_host) => {
            places.retain(|place| !matches!(place, Place::Gguf(_)));
        }
        Strategy::HttpOnly => {}
    }
}

fn shown(place: &Place) -> String {
    match place {
        Place::Gguf(_) => GGUF.to_owned(),
        Place::Hosts { kind, hosts, .. } => {
            let hosts: Vec<&str> = hosts.iter().map(|on| on.host.as_str()).collect();
            format!("{}:{}", backend_of(*kind), hosts.join("|"))
        }
        Place::Model(model) => model.to_string(),
    }
}

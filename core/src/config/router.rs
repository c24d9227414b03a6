//! Models with `role: router`: how texts are scored, and which model each label takes.

use std::collections::BTreeMap;

use super::at::At;
use super::check::{Check, did_you_mean};
use super::domain::{ModelRole, RouterConfig, RouterKind, RouterRule};
use super::field::Field;
use super::models::{Scope, class};
use super::raw::{RawModel, RawRouterKind, RawRule};
use crate::router::Condition;
use crate::units::ModelName;

/// Takes the router's keys out of `raw`.
pub(super) fn router(
    name: &ModelName,
    raw: &mut RawModel,
    at: &At<'_>,
    scope: &Scope,
    check: &mut Check<'_>,
) -> Option<RouterConfig> {
    let raw = RouterKeys::take(raw);
    let at_kind = at.key("kind");
    if raw.kind.is_absent() {
        check.problem(&at_kind, "missing: write `kind: similarity` or `kind: classifier`");
    }
    let kind = check.optional(&at_kind, raw.kind);
    let kind = kind.and_then(|kind| match kind {
        RawRouterKind::Similarity => similarity(raw.model, raw.labels, at, scope, check),
        RawRouterKind::Classifier => {
            let of_similarity = [("model", raw.model.is_absent()), ("labels", raw.labels.is_absent())];
            for (key, _) in of_similarity.into_iter().filter(|(_, absent)| !absent) {
                check.problem(
                    &at.key(key),
                    format!("`{key}` is for kind similarity; a classifier has its own"),
                );
            }
            Some(RouterKind::Classifier { model: name.clone() })
        }
    });

    let rules = rules(raw.rules, kind.as_ref(), &at.key("rules"), scope, check);
    let routes = routes(raw.routes, kind.as_ref(), &at.key("routes"), scope, check);
    let at_default = at.key("default");
    let default = check.optional(&at_default, raw.default);
    let default = default.and_then(|given| scope.model(&given, ModelRole::Llm, &at_default, check));
    let at_threshold = at.key("threshold");
    let threshold = check.setting(&at_threshold, raw.threshold, 0.0);
    check.require(&at_threshold, (0.0..=1.0).contains(&threshold), "must be from 0 to 1");
    Some(RouterConfig { kind: kind?, rules, routes, default, threshold: threshold as f32 })
}

/// Notes keys that only a router has.
pub(super) fn no_router_keys(raw: &RawModel, at: &At<'_>, check: &mut Check<'_>) {
    let keys = [
        ("kind", raw.kind.is_absent()),
        ("model", raw.model.is_absent()),
        ("labels", raw.labels.is_absent()),
        ("rules", raw.rules.is_absent()),
        ("routes", raw.routes.is_absent()),
        ("default", raw.default.is_absent()),
        ("threshold", raw.threshold.is_absent()),
    ];
    for (key, _) in keys.into_iter().filter(|(_, absent)| !absent) {
        check.problem(&at.key(key), format!("`{key}` is for routers: add `role: router`, or remove it"));
    }
}

/// Notes keys that only a model has which can be loaded. A class is allowed: it is that of the embedding model.
pub(super) fn no_place_keys(raw: RawModel, at: &At<'_>, check: &mut Check<'_>) {
    let keys = [
        ("backend", raw.backend.is_absent()),
        ("fallback", raw.fallback.is_absent()),
        ("host", raw.host.is_absent()),
        ("host_model", raw.host_model.is_absent()),
        ("path", raw.path.is_absent()),
        ("mmproj", raw.mmproj.is_absent()),
        ("projector_ttl", raw.projector_ttl.is_absent()),
        ("context", raw.context.is_absent()),
        ("weights", raw.weights.is_absent()),
        ("threads", raw.threads.is_absent()),
        ("parallel", raw.parallel.is_absent()),
        ("lora", raw.lora.is_absent()),
        ("ttl", raw.ttl.is_absent()),
    ];
    for (key, _) in keys.into_iter().filter(|(_, absent)| !absent) {
        let message =
            format!("a router of kind similarity loads nothing itself; `{key}` belongs to its model");
        check.problem(&at.key(key), message);
    }
    class(raw.class, ModelRole::Router, at, check);
}

/// The keys of a router.
struct RouterKeys {
    kind: Field<RawRouterKind>,
    model: Field<String>,
    labels: Field<BTreeMap<String, Field<Vec<String>>>>,
    rules: Field<Vec<Field<RawRule>>>,
    routes: Field<BTreeMap<String, Field<String>>>,
    default: Field<String>,
    threshold: Field<f64>,
}

impl RouterKeys {
    fn take(raw: &mut RawModel) -> Self {
        Self {
            kind: std::mem::take(&mut raw.kind),
            model: std::mem::take(&mut raw.model),
            labels: std::mem::take(&mut raw.labels),
            rules: std::mem::take(&mut raw.rules),
            routes: std::mem::take(&mut raw.routes),
            default: std::mem::take(&mut raw.default),
            threshold: std::mem::take(&mut raw.threshold),
        }
    }
}

fn similarity(
    model: Field<String>,
    labels: Field<BTreeMap<String, Field<Vec<String>>>>,
    at: &At<'_>,
    scope: &Scope,
    check: &mut Check<'_>,
) -> Option<RouterKind> {
    let at_model = at.key("model");
    if model.is_absent() {
        check.problem(&at_model, "missing: the embedding model that compares texts");
    }
    let model = check.optional(&at_model, model);
    let model = model.and_then(|given| scope.model(&given, ModelRole::Embedding, &at_model, check));

    let at_labels = at.key("labels");
    let mut texts = BTreeMap::new();
    let labels_given = !labels.is_absent();
    for (label, examples) in check.read(&at_labels, labels).unwrap_or_default() {
        let at = at_labels.key(&label);
        if examples.is_absent() {
            check.problem(&at, "needs at least one example text");
        }
        let Some(examples) = check.optional(&at, examples) else { continue };
        let usable = !examples.is_empty() && examples.iter().all(|example| !example.trim().is_empty());
        check.require(&at, usable, "needs at least one example text, and none that is empty");
        texts.insert(label, examples);
    }
    if !labels_given || at_labels.node.is_some_and(|node| node.is_empty_map()) {
        check.problem(&at_labels, "missing: example texts for each label");
    }
    Some(RouterKind::Similarity { model: model?, labels: texts })
}

fn rules(
    field: Field<Vec<Field<RawRule>>>,
    kind: Option<&RouterKind>,
    at: &At<'_>,
    scope: &Scope,
    check: &mut Check<'_>,
) -> Vec<RouterRule> {
    let mut rules = Vec::new();
    for (index, rule) in check.read(at, field).unwrap_or_default().into_iter().enumerate() {
        let at = at.item(index);
        let rule = check.read(&at, rule).unwrap_or_default();
        let (at_when, at_model) = (at.key("when"), at.key("model"));
        check.require(&at_when, !rule.when.is_absent(), "missing: the condition");
        check.require(&at_model, !rule.model.is_absent(), "missing: the model that it leads to");
        let when = check.optional(&at_when, rule.when).filter(|when| {
            // A classifier's labels are in its file.
            let labels = match kind {
                Some(RouterKind::Similarity { labels, .. }) => {
                    Some(labels.keys().map(String::as_str).collect::<Vec<&str>>())
                }
                Some(RouterKind::Classifier { .. }) | None => None,
            };
            let condition = Condition::new(when, labels.as_deref());
            if let Err(message) = &condition {
                check.problem(&at_when, message.clone());
            }
            condition.is_ok()
        });
        let model = check.optional(&at_model, rule.model);
        let model = model.and_then(|given| scope.model(&given, ModelRole::Llm, &at_model, check));
        rules.extend(when.zip(model).map(|(when, model)| RouterRule { when, model }));
    }
    rules
}

fn routes(
    field: Field<BTreeMap<String, Field<String>>>,
    kind: Option<&RouterKind>,
    at: &At<'_>,
    scope: &Scope,
    check: &mut Check<'_>,
) -> BTreeMap<String, ModelName> {
    let mut routes = BTreeMap::new();
    for (label, model) in check.read(at, field).unwrap_or_default() {
        let at = at.key(&label);
        // A classifier's labels are in its file.
        if let Some(RouterKind::Similarity { labels, .. }) = kind
            && !labels.contains_key(&label)
        {
            let hint = did_you_mean(&label, labels.keys().map(String::as_str));
            check.problem(&at, format!("`{label}` is not among the labels{hint}"));
        }
        if model.is_absent() {
            check.problem(&at, "needs the name of a model");
        }
        let Some(given) = check.optional(&at, model) else { continue };
        if let Some(model) = scope.model(&given, ModelRole::Llm, &at, check) {
            routes.insert(label, model);
        }
    }
    routes
}

//! `models:`: what each is for, and the places that can serve it.

use std::collections::{BTreeMap, BTreeSet};

use super::at::At;
use super::build::named;
use super::check::{Check, did_you_mean};
use super::domain::{Class, HostKind, ModelConfig, ModelRole, Place, RouterConfig, Strategy};
use super::field::Field;
use super::hosts::IMPLICIT;
use super::places::{self, Switch};
use super::raw::{RawHost, RawModel, RawRouterKind};
use super::router;
use super::values::Span;
use crate::answer::OnStreamFailure;
use crate::units::ModelName;

/// The models of a configuration, and its router.
#[derive(Debug, Default)]
pub(super) struct Models {
    pub(super) by_name: BTreeMap<ModelName, ModelConfig>,
    pub(super) router: Option<RouterConfig>,
}

/// What can be referred to, whether or not it has problems of its own.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) hosts: BTreeMap<String, HostKind>,
    pub(super) models: BTreeMap<String, Known>,
    pub(super) strategy: Strategy,
}

/// What is known of a model before it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It can be loaded.
    Model(ModelRole),
    /// It scores texts by another model.
    SimilarityRouter,
    /// What it is has a problem of its own; references to it are taken as right.
    Unclear,
}

/// Checks all models.
pub(super) fn models(
    raw: BTreeMap<String, Field<RawModel>>,
    at: &At<'_>,
    scope: &Scope,
    check: &mut Check<'_>,
) -> Models {
    let switch = Switch::read(check);
    let mut models = Models::default();
    let mut router_name = None;
    for (name, mut raw, at) in named::<ModelName, RawModel>(raw, at, check) {
        if matches!(name.as_str(), places::GGUF | places::OLLAMA | places::OPENAI) {
            check.problem(&at, "a model cannot have the name of a backend");
        }
        let role = check.setting(&at.key("role"), std::mem::take(&mut raw.role), ModelRole::default());
        if role == ModelRole::Router {
            if let Some(first) = router_name.replace(name.clone()) {
                check.problem(&at, format!("a second router; {first} is one already"));
            }
            models.router = router::router(&name, &mut raw, &at, scope, check);
        } else {
            router::no_router_keys(&raw, &at, check);
        }
        if scope.models.get(name.as_str()) == Some(&Known::SimilarityRouter) {
            router::no_place_keys(raw, &at, check);
        } else if let Some(model) = model(&name, role, raw, &at, (scope, &switch), check) {
            models.by_name.insert(name, model);
        }
    }
    fallback_cycles(&models.by_name, at, check);
    models
}

impl Models {
    /// Whether a model runs on the host that models have when they name none.
    pub(super) fn uses_implicit_host(&self) -> bool {
        let places = self.by_name.values().flat_map(|model| &model.places);
        places
            .into_iter()
            .any(|place| matches!(place, Place::Hosts { hosts, .. } if hosts.iter().any(|on| on.host.as_str() == IMPLICIT)))
    }
}

impl Scope {
    pub(super) fn new(
        hosts: &BTreeMap<String, Field<RawHost>>,
        models: &BTreeMap<String, Field<RawModel>>,
        strategy: Strategy,
    ) -> Self {
        Self {
            hosts: hosts.iter().map(|(name, raw)| (name.clone(), kind_of(raw))).collect(),
            models: models.iter().map(|(name, raw)| (name.clone(), Known::of(raw))).collect(),
            strategy,
        }
    }

    /// Whether there is a router, as far as that is clear.
    pub(super) fn may_have_router(&self) -> bool {
        self.models.values().any(|known| match known {
            Known::SimilarityRouter | Known::Model(ModelRole::Router) | Known::Unclear => true,
            Known::Model(ModelRole::Llm | ModelRole::Embedding | ModelRole::Reranker) => false,
        })
    }

    /// The model called `given`, which must be of `role`.
    pub(super) fn model(
        &self,
        given: &str,
        role: ModelRole,
        at: &At<'_>,
        check: &mut Check<'_>,
    ) -> Option<ModelName> {
        match self.models.get(given) {
            Some(Known::Unclear) => return given.parse().ok(),
            Some(Known::Model(found)) if *found == role => return given.parse().ok(),
            Some(Known::Model(found)) => {
                let (found, wanted) = (role_name(*found), role_name(role));
                check.problem(at, format!("model `{given}` has role {found}; this needs role {wanted}"));
            }
            Some(Known::SimilarityRouter) => {
                check.problem(
                    at,
                    format!("`{given}` is a router of kind similarity, not a model that can be loaded"),
                );
            }
            None => {
                let hint = did_you_mean(given, self.models.keys().map(String::as_str));
                check.problem(at, format!("unknown model `{given}`{hint}"));
            }
        }
        None
    }
}

impl Known {
    fn of(raw: &Field<RawModel>) -> Self {
        let raw = match raw {
            Field::Absent => return Self::Model(ModelRole::default()),
            Field::Given(raw) => raw,
            Field::Wrong(_) => return Self::Unclear,
        };
        match (&raw.role, &raw.kind) {
            (Field::Given(ModelRole::Router), Field::Given(RawRouterKind::Similarity)) => {
                Self::SimilarityRouter
            }
            (Field::Given(ModelRole::Router), Field::Absent | Field::Wrong(_)) | (Field::Wrong(_), _) => {
                Self::Unclear
            }
            (Field::Given(role), _) => Self::Model(*role),
            (Field::Absent, _) => Self::Model(ModelRole::default()),
        }
    }
}

fn model(
    name: &ModelName,
    role: ModelRole,
    mut raw: RawModel,
    at: &At<'_>,
    (scope, switch): (&Scope, &Switch),
    check: &mut Check<'_>,
) -> Option<ModelConfig> {
    let class = class(std::mem::take(&mut raw.class), role, at, check);
    let at_ttl = at.key("ttl");
    let ttl = check.optional(&at_ttl, std::mem::take(&mut raw.ttl));
    if ttl.is_some() && class == Class::Resident {
        check.warn(&at_ttl, "no effect: a resident model stays loaded");
    }
    let at_failure = at.key("on_stream_failure");
    let on_stream_failure =
        check.setting(&at_failure, std::mem::take(&mut raw.on_stream_failure), OnStreamFailure::default());
    let at_hedge = at.key("hedge_after");
    let hedge_after = check.optional(&at_hedge, std::mem::take(&mut raw.hedge_after));
    let places = places::places(name, role, raw, at, (scope, switch), check);
    if let [_] = places.as_slice()
        && hedge_after.is_some()
    {
        check.warn(&at_hedge, "no effect: there is no other place to make ready");
    }
    (!places.is_empty()).then(|| ModelConfig {
        role,
        class,
        places,
        ttl: ttl.map(|Span(ttl)| ttl),
        on_stream_failure,
        hedge_after: hedge_after.map(|Span(after)| after),
    })
}

/// A host's kind; one with a problem of its own is taken for the default.
fn kind_of(host: &Field<RawHost>) -> HostKind {
    host.given().and_then(|host| host.kind.given()).copied().unwrap_or_default()
}

/// The class, by default that of the role.
pub(super) fn class(field: Field<Class>, role: ModelRole, at: &At<'_>, check: &mut Check<'_>) -> Class {
    let default = match role {
        ModelRole::Llm => Class::OnDemand,
        ModelRole::Embedding | ModelRole::Router | ModelRole::Reranker => Class::Resident,
    };
    check.setting(&at.key("class"), field, default)
}

const fn role_name(role: ModelRole) -> &'static str {
    match role {
        ModelRole::Llm => "llm",
        ModelRole::Embedding => "embedding",
        ModelRole::Router => "router",
        ModelRole::Reranker => "reranker",
    }
}

/// Models that fall back to each other would never give up.
fn fallback_cycles(models: &BTreeMap<ModelName, ModelConfig>, at: &At<'_>, check: &mut Check<'_>) {
    let mut done = BTreeSet::new();
    for name in models.keys() {
        let mut chain = Vec::new();
        follow(name, models, &mut chain, &mut done, &mut |cycle| {
            let names: Vec<&str> = cycle.iter().map(|name| name.as_str()).collect();
            let at = at.key(names[0]).key("fallback");
            check.problem(
                &at,
                format!("these fall back to each other: {} -> {}", names.join(" -> "), names[0]),
            );
        });
    }
}

/// Follows the fallbacks of `name`, depth first. The depth is bounded by the number of models: `chain` never holds
/// one twice.
fn follow<'m>(
    name: &'m ModelName,
    models: &'m BTreeMap<ModelName, ModelConfig>,
    chain: &mut Vec<&'m ModelName>,
    done: &mut BTreeSet<&'m ModelName>,
    found: &mut dyn FnMut(&[&'m ModelName]),
) {
    if let Some(start) = chain.iter().position(|above| *above == name) {
        found(&chain[start..]);
        return;
    }
    if done.contains(name) {
        return;
    }
    chain.push(name);
    for place in models.get(name).into_iter().flat_map(|model| &model.places) {
        match place {
            Place::Model(next) => follow(next, models, chain, done, found),
            Place::Gguf(_) | Place::Hosts { .. } => {}
        }
    }
    chain.pop();
    done.insert(name);
}

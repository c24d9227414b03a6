//! `pipelines:`: keys, types, names and templates.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::at::At;
use super::build::named;
use super::check::{Check, did_you_mean};
use super::domain::{InputConfig, ModelRole, PipelineConfig, StepAction, StepConfig};
use super::field::Field;
use super::models::Scope;
use super::raw::{RawPipeline, RawSampling, RawStep};
use super::values::{Names, Span};
use crate::pipeline::{Pipeline, is_template};
use crate::request::Sampling;
use crate::tone::Tones;
use crate::units::{PipelineName, StepId};

/// How often a step may be tried again.
const MOST_RETRIES: u32 = 10;

/// Checks all pipelines.
pub(super) fn pipelines(
    raw: Field<BTreeMap<String, Field<RawPipeline>>>,
    at: &At<'_>,
    (scope, tones): (&Scope, &Tones),
    check: &mut Check<'_>,
) -> BTreeMap<PipelineName, PipelineConfig> {
    let raw = check.read(at, raw).unwrap_or_default();
    let mut pipelines = BTreeMap::new();
    for (name, raw, at) in named::<PipelineName, RawPipeline>(raw, at, check) {
        let config = pipeline(raw, &at, scope, check);
        check_templates(&name, &config, tones, &at.key("steps"), check);
        pipelines.insert(name, config);
    }
    pipelines
}

/// Compiles the templates, unless steps are missing because of other problems: then places and names would be off.
fn check_templates(
    name: &PipelineName,
    config: &PipelineConfig,
    tones: &Tones,
    at: &At<'_>,
    check: &mut Check<'_>,
) {
    if at.node.is_none_or(|steps| steps.item(config.steps.len()).is_some()) {
        return;
    }
    for problem in Pipeline::compile(name.clone(), config, tones).err().unwrap_or_default() {
        check.problem(&at.item(problem.step).key(problem.key), problem.message);
    }
}

fn pipeline(raw: RawPipeline, at: &At<'_>, scope: &Scope, check: &mut Check<'_>) -> PipelineConfig {
    let input = input(raw.input, &at.key("input"), check);
    let at_steps = at.key("steps");
    if raw.steps.is_absent() || raw.steps.given().is_some_and(Vec::is_empty) {
        check.problem(&at_steps, "missing: a pipeline needs at least one step");
    }
    let raw_steps = check.read(&at_steps, raw.steps).unwrap_or_default();
    let ids: Vec<Option<String>> =
        raw_steps.iter().map(|step| step.given().and_then(|step| step.id.given().cloned())).collect();
    let mut steps = Vec::new();
    for (index, field) in raw_steps.into_iter().enumerate() {
        let at = at_steps.item(index);
        if field.is_absent() {
            check.problem(&at, "an empty step");
        }
        let Some(raw) = check.read(&at, field) else { continue };
        if let Some(id) = ids[index].as_deref()
            && ids[..index].iter().any(|earlier| earlier.as_deref() == Some(id))
        {
            check.problem(&at.key("id"), format!("a second step `{id}`; ids are unique"));
        }
        steps.extend(step(raw, &ids, &at, (scope, input), check));
    }
    PipelineConfig { input, steps }
}

fn input(field: Field<Names>, at: &At<'_>, check: &mut Check<'_>) -> InputConfig {
    let given = check.setting(at, field, Names::One("text".to_owned()));
    let mut input = InputConfig::default();
    for kind in given.as_slice() {
        match kind.as_str() {
            "text" => input.text = true,
            "audio" => input.audio = true,
            "image" => input.image = true,
            other => {
                let hint = did_you_mean(other, ["text", "audio", "image"]);
                check.problem(at, format!("`{other}` is neither text, audio nor image{hint}"));
            }
        }
    }
    input
}

fn step(
    mut raw: RawStep,
    ids: &[Option<String>],
    at: &At<'_>,
    (scope, input): (&Scope, InputConfig),
    check: &mut Check<'_>,
) -> Option<StepConfig> {
    let at_id = at.key("id");
    if raw.id.is_absent() {
        check.problem(&at_id, "missing: a name for the step");
    }
    let id = check.optional(&at_id, std::mem::take(&mut raw.id));
    let id = id.and_then(|id| match id.parse::<StepId>() {
        Ok(_) if id == "input" => {
            check.problem(&at_id, "`input` is the pipeline's input; take another name");
            None
        }
        Ok(id) => Some(id),
        Err(error) => {
            check.problem(&at_id, error.to_string());
            None
        }
    });
    let needs = needs(std::mem::take(&mut raw.needs), id.as_ref(), ids, &at.key("needs"), check);
    let at_timeout = at.key("timeout");
    let timeout = check.optional(&at_timeout, raw.timeout.clone()).map(|Span(timeout)| timeout);
    check.require(&at_timeout, timeout.is_none_or(|timeout| !timeout.is_zero()), "must be longer than 0");
    let at_retry = at.key("retry");
    let retry = check.optional(&at_retry, std::mem::take(&mut raw.retry)).unwrap_or(0);
    check.require(&at_retry, retry <= MOST_RETRIES, "must be from 0 to 10");
    let when = check.optional(&at.key("when"), std::mem::take(&mut raw.when));
    let fallback = check.optional(&at.key("fallback"), std::mem::take(&mut raw.fallback));
    let action = action(raw, at, (scope, input), check)?;
    check.require(
        &at.key("fallback"),
        fallback.is_none() || !matches!(action, StepAction::Route { .. }),
        "`fallback` belongs to steps with a text; the router's `default` stands in for a route",
    );
    Some(StepConfig { id: id?, action, when, needs, timeout, retry, fallback })
}

fn needs(
    field: Field<Names>,
    own: Option<&StepId>,
    ids: &[Option<String>],
    at: &At<'_>,
    check: &mut Check<'_>,
) -> Vec<StepId> {
    let given = check.optional(at, field);
    let mut needs: Vec<StepId> = Vec::new();
    for name in given.iter().flat_map(Names::as_slice) {
        if own.is_some_and(|own| own.as_str() == name) {
            check.problem(at, "a step cannot need itself");
        } else if ids.iter().flatten().any(|id| id == name) {
            needs.extend(name.parse().ok().filter(|id| !needs.contains(id)));
        } else {
            let hint = did_you_mean(name, ids.iter().flatten().map(String::as_str));
            check.problem(at, format!("unknown step `{name}`{hint}"));
        }
    }
    needs
}

/// The one thing a step does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deed {
    Prompt,
    Describe,
    Transcribe,
    Modulate,
    Route,
}

fn action(
    raw: RawStep,
    at: &At<'_>,
    (scope, input): (&Scope, InputConfig),
    check: &mut Check<'_>,
) -> Option<StepAction> {
    let deed = deed(&raw, at, check);
    if let Some(deed) = deed {
        keys_fit(&raw, deed, at, check);
    }
    let at_model = at.key("model");
    let model = check.optional(&at_model, raw.model).and_then(|given| model(given, &at_model, scope, check));
    let prompt = check.optional(&at.key("prompt"), raw.prompt);
    let system = check.optional(&at.key("system"), raw.system);
    let text = check.optional(&at.key("modulate"), raw.modulate);
    let tone = check.optional(&at.key("tone"), raw.tone);
    let route = check.optional(&at.key("route"), raw.route);
    let stream = check.optional(&at.key("stream"), raw.stream).unwrap_or(true);
    let language = check.optional(&at.key("language"), raw.language);
    of_input(raw.describe, "image", input.image, &at.key("describe"), check);
    of_input(raw.transcribe, "audio", input.audio, &at.key("transcribe"), check);
    let sampling = sampling(raw.sampling, &at.key("sampling"), check);
    match deed? {
        Deed::Prompt => Some(StepAction::Prompt { model: model?, prompt: prompt?, system, sampling }),
        Deed::Describe => Some(StepAction::Describe { model: model?, prompt, system, sampling }),
        Deed::Transcribe => Some(StepAction::Transcribe { model: model?, language, sampling }),
        Deed::Modulate => {
            Some(StepAction::Modulate { model: model?, text: text?, tone: tone?, sampling, stream })
        }
        Deed::Route => {
            check.require(
                &at.key("route"),
                scope.may_have_router(),
                "there is no router: add a model with `role: router`",
            );
            Some(StepAction::Route { text: route? })
        }
    }
}

/// Checks a key whose value can only be a part of the pipeline's input that is no text.
fn of_input(field: Field<String>, part: &str, is_given: bool, at: &At<'_>, check: &mut Check<'_>) {
    let Some(given) = check.optional(at, field) else { return };
    let inside = given.trim().strip_prefix("{{").and_then(|rest| rest.strip_suffix("}}"));
    if inside.map(str::trim) != Some(&format!("input.{part}")) {
        check.problem(at, format!("must be \"{{{{ input.{part} }}}}\", and nothing else"));
    } else if !is_given {
        check.problem(at, format!("the pipeline is not given any: write `input: {part}` above its steps"));
    }
}

fn deed(raw: &RawStep, at: &At<'_>, check: &mut Check<'_>) -> Option<Deed> {
    let given: Vec<(&str, Deed)> = [
        // Beside `describe`, it is what is asked about the image.
        ("prompt", Deed::Prompt, raw.prompt.is_absent() || !raw.describe.is_absent()),
        ("describe", Deed::Describe, raw.describe.is_absent()),
        ("transcribe", Deed::Transcribe, raw.transcribe.is_absent()),
        ("modulate", Deed::Modulate, raw.modulate.is_absent()),
        ("route", Deed::Route, raw.route.is_absent()),
    ]
    .into_iter()
    .filter_map(|(key, deed, absent)| (!absent).then_some((key, deed)))
    .collect();
    match given.as_slice() {
        [(_, deed)] => Some(*deed),
        [] => {
            check.problem(
                at,
                "does nothing: it needs one of prompt, describe, transcribe, modulate and route",
            );
            None
        }
        several => {
            let keys: Vec<&str> = several.iter().map(|(key, _)| *key).collect();
            check.problem(at, format!("does more than one thing ({}): make a step of each", keys.join(", ")));
            None
        }
    }
}

/// Notes keys that are missing for what the step does, or mean nothing for it.
fn keys_fit(raw: &RawStep, deed: Deed, at: &At<'_>, check: &mut Check<'_>) {
    let asks = deed != Deed::Route;
    let is_asked = matches!(deed, Deed::Prompt | Deed::Describe);
    if asks && raw.model.is_absent() {
        check.problem(&at.key("model"), "missing: the model to ask");
    }
    if deed == Deed::Modulate && raw.tone.is_absent() {
        check.problem(&at.key("tone"), "missing: the tone to say it in, such as friendly");
    }
    let keys = [
        ("model", raw.model.is_absent(), asks, "steps that ask a model"),
        ("sampling", raw.sampling.is_absent(), asks, "steps that ask a model"),
        ("system", raw.system.is_absent(), is_asked, "prompt and describe"),
        ("tone", raw.tone.is_absent(), deed == Deed::Modulate, "modulate"),
        ("stream", raw.stream.is_absent(), deed == Deed::Modulate, "modulate"),
        ("language", raw.language.is_absent(), deed == Deed::Transcribe, "transcribe"),
    ];
    for (key, absent, fits, home) in keys {
        if !absent && !fits {
            check.problem(&at.key(key), format!("`{key}` belongs to {home}; remove it here"));
        }
    }
}

/// The model's name, or a template that gives one when the step runs.
fn model(given: String, at: &At<'_>, scope: &Scope, check: &mut Check<'_>) -> Option<String> {
    if is_template(&given) {
        return Some(given);
    }
    scope.model(&given, ModelRole::Llm, at, check).map(|model| model.to_string())
}

/// Penalties that are added may go either way.
const ANY: RangeInclusive<f64> = -100.0..=100.0;

pub(super) fn sampling(field: Field<RawSampling>, at: &At<'_>, check: &mut Check<'_>) -> Sampling {
    let Some(raw) = check.read(at, field) else { return Sampling::default() };
    let at_max = at.key("max_tokens");
    let max_tokens = check.optional(&at_max, raw.max_tokens);
    check.require(&at_max, max_tokens != Some(0), "must be 1 or more");
    let at_stop = at.key("stop");
    let stop = check.optional(&at_stop, raw.stop).map(|stop| stop.as_slice().to_vec()).unwrap_or_default();
    check.require(&at_stop, stop.iter().all(|text| !text.is_empty()), "an empty text would stop at once");
    let at_penalty = at.key("repeat_penalty");
    let repeat_penalty = number(raw.repeat_penalty, 0.0..=f64::from(f32::MAX), &at_penalty, check);
    check.require(&at_penalty, repeat_penalty != Some(0.0), "must be above 0");
    Sampling {
        temperature: number(raw.temperature, 0.0..=f64::from(f32::MAX), &at.key("temperature"), check),
        top_k: check.optional(&at.key("top_k"), raw.top_k),
        top_p: number(raw.top_p, 0.0..=1.0, &at.key("top_p"), check),
        min_p: number(raw.min_p, 0.0..=1.0, &at.key("min_p"), check),
        repeat_penalty,
        presence_penalty: number(raw.presence_penalty, ANY, &at.key("presence_penalty"), check),
        frequency_penalty: number(raw.frequency_penalty, ANY, &at.key("frequency_penalty"), check),
        seed: check.optional(&at.key("seed"), raw.seed),
        max_tokens,
        stop,
    }
}

fn number(field: Field<f64>, range: RangeInclusive<f64>, at: &At<'_>, check: &mut Check<'_>) -> Option<f32> {
    let value = check.optional(at, field)?;
    if !range.contains(&value) {
        let bound = if *range.end() <= 1.0 { "from 0 to 1" } else { "0 or more" };
        check.problem(at, format!("must be {bound}"));
        return None;
    }
    Some(value as f32)
}

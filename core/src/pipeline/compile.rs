use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};

use crate::config::{InputConfig, PipelineConfig, StepAction, StepConfig};
use crate::error::Error;
use crate::nearest::nearest;
use crate::request::Sampling;
use crate::tone::Tones;
use crate::units::{ModelName, PipelineName, StepId};

/// A pipeline whose templates are known to be well formed and to refer only to what there is.
#[derive(Debug)]
pub struct Pipeline {
    pub(super) name: PipelineName,
    pub(super) input: InputConfig,
    pub(super) steps: Vec<Step>,
    pub(super) tones: Tones,
    templates: Environment<'static>,
}

#[derive(Debug)]
pub(super) struct Step {
    pub(super) id: StepId,
    pub(super) action: Action,
    /// The model it asks, where the file names it.
    pub(super) model: Option<ModelName>,
    /// The steps that must end first, by their places in the file.
    pub(super) after: BTreeSet<usize>,
    /// The one of them whose text it can take sentence by sentence.
    pub(super) follows: Option<usize>,
    pub(super) when: Option<Template>,
    pub(super) timeout: Option<Duration>,
    pub(super) retry: u32,
    pub(super) fallback: Option<Template>,
}

#[derive(Debug)]
pub(super) enum Action {
    Prompt { model: Template, prompt: Template, system: Option<Template>, sampling: Sampling },
    Describe { model: Template, prompt: Template, system: Option<Template>, sampling: Sampling },
    Transcribe { model: Template, language: Option<String>, sampling: Sampling },
    Modulate { model: Template, text: Template, tone: Template, sampling: Sampling },
    Route { text: Template },
}

/// A template of the pipeline's environment, by its name there.
#[derive(Clone, Debug)]
pub(super) struct Template(String);

/// A template that is not well formed, or refers to something that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateProblem {
    /// The step, by its place in the file from 0.
    pub step: usize,
    /// The step's key.
    pub key: &'static str,
    /// What is wrong.
    pub message: String,
}

/// What is asked of an image where the step does not say.
const DESCRIBE: &str = "Describe the image.";
/// Steps that a template may take; one that never ends stops here.
const FUEL: u64 = 10_000_000;

/// What a step's result offers to later steps.
const PROMPT_FIELDS: &[&str] = &["text", "served_by", "fallback_reason", "skipped"];
const ROUTE_FIELDS: &[&str] = &["label", "model", "scores", "skipped"];

impl Pipeline {
    /// Compiles a pipeline's templates. Its ids must be unique, which the configuration sees to.
    ///
    /// # Errors
    /// All templates that are not well formed or refer to an unknown step or field, tones that are not there, and steps that
    /// wait for each other.
    pub fn compile(
        name: PipelineName,
        config: &PipelineConfig,
        tones: &Tones,
    ) -> Result<Self, Vec<TemplateProblem>> {
        let mut templates = Environment::new();
        templates.set_fuel(Some(FUEL));
        templates.set_undefined_behavior(UndefinedBehavior::Strict);
        templates.set_auto_escape_callback(|_| AutoEscape::None);
        let mut compiler = Compiler { config, tones, templates, problems: Vec::new() };
        let steps: Vec<Step> =
            config.steps.iter().enumerate().map(|(place, step)| compiler.step(place, step)).collect();
        compiler.check_cycles(&steps);
        if compiler.problems.is_empty() {
            let (tones, templates) = (tones.clone(), compiler.templates);
            Ok(Self { name, input: config.input, steps, tones, templates })
        } else {
            Err(compiler.problems)
        }
    }

    /// The pipeline's name.
    #[must_use]
    pub fn name(&self) -> &PipelineName {
        &self.name
    }

    pub(super) fn render(
        &self,
        template: &Template,
        context: &BTreeMap<String, Value>,
    ) -> Result<String, Error> {
        let rendered = self
            .templates
            .get_template(&template.0)
            .and_then(|t| t.render(Value::from_pairs(context.clone())));
        rendered.map_err(|error| Error::Template { message: describe(&error) })
    }
}

struct Compiler<'a> {
    config: &'a PipelineConfig,
    tones: &'a Tones,
    templates: Environment<'static>,
    problems: Vec<TemplateProblem>,
}

impl Compiler<'_> {
    fn step(&mut self, place: usize, step: &StepConfig) -> Step {
        let mut after: BTreeSet<usize> =
            step.needs.iter().filter_map(|id| self.place_of(id.as_str())).collect();
        let mut take = |key, source: &str| self.template(place, key, source.to_owned(), &mut after);
        let action = match &step.action {
            StepAction::Prompt { model, prompt, system, sampling } => Action::Prompt {
                model: take("model", model),
                prompt: take("prompt", prompt),
                system: system.as_deref().map(|system| take("system", system)),
                sampling: sampling.clone(),
            },
            StepAction::Describe { model, prompt, system, sampling } => Action::Describe {
                model: take("model", model),
                prompt: take("prompt", prompt.as_deref().unwrap_or(DESCRIBE)),
                system: system.as_deref().map(|system| take("system", system)),
                sampling: sampling.clone(),
            },
            StepAction::Transcribe { model, language, sampling } => Action::Transcribe {
                model: take("model", model),
                language: language.clone(),
                sampling: sampling.clone(),
            },
            StepAction::Modulate { model, text, tone, sampling, .. } => Action::Modulate {
                model: take("model", model),
                text: take("modulate", text),
                tone: take("tone", tone),
                sampling: sampling.clone(),
            },
            StepAction::Route { text } => Action::Route { text: take("route", text) },
        };
        let fallback = step.fallback.as_deref().map(|text| take("fallback", text));
        let when = step.when.as_deref().map(|when| self.condition(place, when, &mut after));
        if let StepAction::Modulate { tone, .. } = &step.action {
            self.check_tone(place, tone);
        }
        Step {
            id: step.id.clone(),
            action,
            model: step
                .action
                .model()
                .filter(|model| !is_template(model))
                .and_then(|model| model.parse().ok()),
            follows: self.follows(place, step),
            after,
            when,
            timeout: step.timeout,
            retry: step.retry,
            fallback,
        }
    }

    /// The step whose text this one says again and nothing else, so that it can begin with the first sentence.
    fn follows(&self, place: usize, step: &StepConfig) -> Option<usize> {
        let StepAction::Modulate { model, text, tone, stream: true, .. } = &step.action else { return None };
        let reference = text.trim().strip_prefix("{{")?.strip_suffix("}}")?.trim();
        let source = self.place_of(reference.strip_suffix(".text")?).filter(|source| *source != place)?;
        let of_source = &self.config.steps[source];
        let has_text = !matches!(of_source.action, StepAction::Route { .. });
        // Nothing else of it may be needed, and whether the two run at all has to be known from the beginning.
        let name = of_source.id.as_str();
        let others = [Some(model.as_str()), Some(tone.as_str()), step.fallback.as_deref()];
        let free = others.into_iter().flatten().all(|other| !is_template(other) || !other.contains(name))
            && !step.needs.contains(&of_source.id)
            && step.when.is_none();
        (has_text && free).then_some(source)
    }

    fn check_tone(&mut self, place: usize, tone: &str) {
        if is_template(tone) || self.tones.get(tone.trim()).is_some() {
            return;
        }
        let near = self.tones.nearest(tone.trim()).map(|name| format!(", did you mean `{name}`?"));
        let known: Vec<&str> = self.tones.names().collect();
        let (near, known) = (near.unwrap_or_default(), known.join(", "));
        self.problem(
            place,
            "tone",
            format!("unknown tone `{tone}`{near} (there are {known}; more under `tones:`)"),
        );
    }

    /// An expression, made a template that renders to nothing unless it is true.
    fn condition(&mut self, place: usize, expression: &str, after: &mut BTreeSet<usize>) -> Template {
        if let Err(error) = self.templates.compile_expression_owned(expression.to_owned()).map(drop) {
            self.problem(place, "when", describe(&error));
            return Template(String::new());
        }
        self.template(place, "when", format!("{{% if {expression} %}}true{{% endif %}}"), after)
    }

    /// Compiles a template, checks what it refers to, and notes the steps among that.
    fn template(
        &mut self,
        place: usize,
        key: &'static str,
        source: String,
        after: &mut BTreeSet<usize>,
    ) -> Template {
        let name = format!("steps[{place}].{key}");
        if let Err(error) = self.templates.add_template_owned(name.clone(), source) {
            self.problem(place, key, describe(&error));
            return Template(name);
        }
        let names = self.templates.get_template(&name).map(|template| template.undeclared_variables(true));
        // The engine's own functions are no references. Sorted, so that problems come in the same order every time.
        let is_function = |name: &String| self.templates.globals().any(|(own, _)| own == name);
        let names: BTreeSet<String> = names.into_iter().flatten().filter(|name| !is_function(name)).collect();
        for reference in names {
            match self.reference(place, &reference) {
                Ok(step) => after.extend(step),
                Err(message) => self.problem(place, key, message),
            }
        }
        Template(name)
    }

    /// The step that `reference` needs; none for the pipeline's input.
    fn reference(&self, place: usize, reference: &str) -> Result<Option<usize>, String> {
        let (root, field) = match reference.split_once('.') {
            Some((root, rest)) => (root, rest.split('.').next()),
            None => (reference, None),
        };
        let (step, fields) = if root == "input" {
            (None, &["text"][..])
        } else {
            let ids = || self.config.steps.iter().map(|step| step.id.as_str());
            let Some(step) = self.place_of(root) else {
                let near =
                    nearest(root, ids().chain(["input"])).map(|name| format!(", did you mean `{name}`?"));
                return Err(format!("`{root}` is neither `input` nor a step{}", near.unwrap_or_default()));
            };
            if step == place {
                return Err(format!("the step refers to itself (`{reference}`)"));
            }
            let is_route = matches!(self.config.steps[step].action, StepAction::Route { .. });
            (Some(step), if is_route { ROUTE_FIELDS } else { PROMPT_FIELDS })
        };
        match field {
            Some(field) if !fields.contains(&field) => {
                Err(format!("`{root}` has no `{field}`; it has {}", fields.join(", ")))
            }
            Some(_) => Ok(step),
            None => Err(format!("`{root}` stands alone; say which part of it: {}", fields.join(", "))),
        }
    }

    fn place_of(&self, id: &str) -> Option<usize> {
        self.config.steps.iter().position(|step| step.id.as_str() == id)
    }

    /// Takes away steps that wait for nothing that is left; what remains waits for itself.
    fn check_cycles(&mut self, steps: &[Step]) {
        let mut left: BTreeSet<usize> = (0..steps.len()).collect();
        while let Some(free) = left.iter().copied().find(|step| steps[*step].after.is_disjoint(&left)) {
            left.remove(&free);
        }
        if let Some(first) = left.first().copied() {
            let ids: Vec<&str> = left.iter().map(|step| steps[*step].id.as_str()).collect();
            let message = format!("steps wait for each other: {}", ids.join(", "));
            self.problem(first, "id", message);
        }
    }

    fn problem(&mut self, step: usize, key: &'static str, message: String) {
        self.problems.push(TemplateProblem { step, key, message });
    }
}

/// Whether a value is known only when the step runs.
pub(crate) fn is_template(text: &str) -> bool {
    text.contains("{{") || text.contains("{%")
}

/// The engine's message without the name of the template, which is ours.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

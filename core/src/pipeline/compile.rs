use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};

use crate::config::{PipelineConfig, StepAction, StepConfig};
use crate::error::Error;
use crate::nearest::nearest;
use crate::request::Sampling;
use crate::units::{PipelineName, StepId};

/// A pipeline whose templates are known to be well formed and to refer only to what there is.
#[derive(Debug)]
pub struct Pipeline {
    pub(super) name: PipelineName,
    pub(super) steps: Vec<Step>,
    templates: Environment<'static>,
}

#[derive(Debug)]
pub(super) struct Step {
    pub(super) id: StepId,
    pub(super) action: Action,
    /// The steps that must end first, by their places in the file.
    pub(super) after: BTreeSet<usize>,
    pub(super) when: Option<Template>,
    pub(super) timeout: Option<Duration>,
    pub(super) fallback: Option<Template>,
}

#[derive(Debug)]
pub(super) enum Action {
    Prompt { model: Template, prompt: Template, system: Option<Template>, sampling: Sampling },
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

/// What a step's result offers to later steps.
const PROMPT_FIELDS: &[&str] = &["text", "served_by", "fallback_reason", "skipped"];
const ROUTE_FIELDS: &[&str] = &["label", "model", "scores", "skipped"];

impl Pipeline {
    /// Compiles a pipeline's templates. Its ids must be unique, which the configuration sees to.
    ///
    /// # Errors
    /// All templates that are not well formed or refer to an unknown step or field, and steps that wait for each other.
    pub fn compile(name: PipelineName, config: &PipelineConfig) -> Result<Self, Vec<TemplateProblem>> {
        let mut templates = Environment::new();
        templates.set_undefined_behavior(UndefinedBehavior::Strict);
        templates.set_auto_escape_callback(|_| AutoEscape::None);
        let mut compiler = Compiler { config, templates, problems: Vec::new() };
        let steps: Vec<Step> =
            config.steps.iter().enumerate().map(|(place, step)| compiler.step(place, step)).collect();
        compiler.check_cycles(&steps);
        if compiler.problems.is_empty() {
            Ok(Self { name, steps, templates: compiler.templates })
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
            StepAction::Modulate { model, text, tone, sampling } => Action::Modulate {
                model: take("model", model),
                text: take("modulate", text),
                tone: take("tone", tone),
                sampling: sampling.clone(),
            },
            StepAction::Route { text } => Action::Route { text: take("route", text) },
        };
        let fallback = step.fallback.as_deref().map(|text| take("fallback", text));
        let when = step.when.as_deref().map(|when| self.condition(place, when, &mut after));
        Step { id: step.id.clone(), action, after, when, timeout: step.timeout, fallback }
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
        // Sorted, so that problems come in the same order every time.
        let names: BTreeSet<String> = names.into_iter().flatten().collect();
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

/// The engine's message without the name of the template, which is ours.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

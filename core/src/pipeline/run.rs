use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use minijinja::context;
use minijinja::value::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::compile::{Action, Pipeline, Step, Template};
use super::report::{PipelineEvent, PipelineReport, RouteReport, StepReport};
use super::tone;
use crate::answer::{Answer, AnswerEvent, CallOptions, Models};
use crate::error::Error;
use crate::request::{GenerateRequest, Message};
use crate::router::Router;
use crate::units::{ModelName, StepId};

/// What a run is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// `{{ input.text }}`. It is data: nothing in it is taken for a template.
    pub text: String,
}

/// A run: any number of events, then [`PipelineEvent::Done`] or one error. Dropping it stops all its steps.
pub type PipelineStream = Pin<Box<dyn Stream<Item = Result<PipelineEvent, Error>> + Send>>;

/// Events of running steps that may wait for their reader; a slow reader slows the models down.
const UNREAD: usize = 16;

impl Pipeline {
    /// Runs the pipeline. A step starts when all it refers to have ended, so steps that do not need each other run at
    /// once. Each step makes one request at a time and holds no model while it waits for another.
    pub fn run(
        self: &Arc<Self>,
        input: &Input,
        models: Arc<dyn Models>,
        router: Option<Arc<Router>>,
        options: CallOptions,
    ) -> PipelineStream {
        let (events, unread) = mpsc::channel(UNREAD);
        let run = Run {
            runner: Runner { pipeline: Arc::clone(self), models, router, options, events },
            context: BTreeMap::from([("input".to_owned(), context! { text => input.text.as_str() })]),
            started: Instant::now(),
            waiting: (0..self.steps.len()).collect(),
            running: FuturesUnordered::new(),
            reports: BTreeMap::new(),
            unread,
            ready: VecDeque::new(),
            ended: false,
        };
        Box::pin(futures::stream::unfold(run, |mut run| async move {
            let event = run.next().await?;
            Some((event, run))
        }))
    }
}

struct Run {
    runner: Runner,
    /// What templates may refer to: the input, and the results of steps that have ended.
    context: BTreeMap<String, Value>,
    started: Instant,
    waiting: Vec<usize>,
    running: FuturesUnordered<BoxFuture<'static, (usize, Result<StepReport, Error>)>>,
    reports: BTreeMap<usize, StepReport>,
    unread: mpsc::Receiver<PipelineEvent>,
    ready: VecDeque<PipelineEvent>,
    ended: bool,
}

impl Run {
    async fn next(&mut self) -> Option<Result<PipelineEvent, Error>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.ended {
                return None;
            }
            self.start_steps();
            tokio::select! {
                biased;
                Some(event) = self.unread.recv() => return Some(Ok(event)),
                Some((place, result)) = self.running.next() => match result {
                    Ok(report) => self.on_ended(place, report),
                    Err(error) => {
                        self.ended = true;
                        return Some(Err(error));
                    }
                },
            }
        }
    }

    fn start_steps(&mut self) {
        let ready = |reports: &BTreeMap<usize, StepReport>, step: &Step| {
            step.after.iter().all(|s| reports.contains_key(s))
        };
        let steps = &self.runner.pipeline.steps;
        let startable = self.waiting.extract_if(.., |place| ready(&self.reports, &steps[*place]));
        for place in startable {
            let (runner, context) = (self.runner.clone(), self.context.clone());
            self.running.push(async move { (place, runner.step(place, &context).await) }.boxed());
        }
    }

    fn on_ended(&mut self, place: usize, report: StepReport) {
        // What the step said last may still be on its way to the reader.
        while let Ok(event) = self.unread.try_recv() {
            self.ready.push_back(event);
        }
        self.context.insert(report.id.to_string(), as_value(&report));
        self.ready.push_back(PipelineEvent::StepDone(Box::new(report.clone())));
        self.reports.insert(place, report);
        if self.reports.len() == self.runner.pipeline.steps.len() {
            self.ended = true;
            self.ready.push_back(PipelineEvent::Done(self.report()));
        }
    }

    fn report(&self) -> PipelineReport {
        let steps: Vec<StepReport> = self.reports.values().cloned().collect();
        let text = steps.iter().rev().map(|step| &step.text).find(|text| !text.is_empty()).cloned();
        PipelineReport {
            pipeline: self.runner.pipeline.name.clone(),
            text: text.unwrap_or_default(),
            steps,
            total_ms: self.started.elapsed().as_millis() as u64,
        }
    }
}

/// What a step offers to later steps' templates.
fn as_value(report: &StepReport) -> Value {
    let served_by = report.answer.as_ref().map(|answer| answer.provenance.served_by.to_string());
    let reason = report.answer.as_ref().and_then(|answer| answer.provenance.fallback_reason.clone());
    let routing = report.routing.as_ref();
    let scores = routing.map(|routing| routing.scores.iter().map(|s| (s.label.clone(), f64::from(s.score))));
    context! {
        text => report.text.as_str(),
        skipped => report.skipped,
        served_by => served_by,
        fallback_reason => reason,
        label => routing.and_then(|routing| routing.label.clone()),
        model => report.model.as_ref().map(ModelName::to_string),
        scores => scores.map(Value::from_pairs),
    }
}

/// Runs single steps.
#[derive(Clone)]
struct Runner {
    pipeline: Arc<Pipeline>,
    models: Arc<dyn Models>,
    router: Option<Arc<Router>>,
    options: CallOptions,
    events: mpsc::Sender<PipelineEvent>,
}

/// What a step's action gives.
struct Outcome {
    model: Option<ModelName>,
    text: String,
    answer: Option<Answer>,
    routing: Option<RouteReport>,
}

impl Runner {
    async fn step(&self, place: usize, context: &BTreeMap<String, Value>) -> Result<StepReport, Error> {
        let (step, started) = (&self.pipeline.steps[place], Instant::now());
        let failed = |error: Error| Error::Step {
            pipeline: self.pipeline.name.clone(),
            step: step.id.clone(),
            source: Box::new(error),
        };
        let mut report = StepReport {
            id: step.id.clone(),
            kind: step.action.kind(),
            model: None,
            text: String::new(),
            skipped: false,
            error: None,
            answer: None,
            routing: None,
            duration_ms: 0,
        };
        let wanted =
            step.when.as_ref().map(|when| self.pipeline.render(when, context)).transpose().map_err(failed)?;
        if wanted.is_some_and(|rendered| rendered.is_empty()) {
            report.skipped = true;
            return Ok(report);
        }
        match (self.within(step.timeout, self.act(step, context)).await, &step.fallback) {
            (Ok(outcome), _) => {
                report.model = outcome.model;
                report.text = outcome.text;
                report.answer = outcome.answer;
                report.routing = outcome.routing;
            }
            (Err(error), Some(fallback)) => {
                tracing::warn!(pipeline = %self.pipeline.name, step = %step.id, %error, "the step's fallback stands in");
                report.text = self.pipeline.render(fallback, context).map_err(failed)?;
                report.error = Some(error.to_string());
            }
            (Err(error), None) => return Err(failed(error)),
        }
        report.duration_ms = started.elapsed().as_millis() as u64;
        Ok(report)
    }

    async fn within<T>(
        &self,
        limit: Option<Duration>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match limit {
            Some(limit) => {
                tokio::time::timeout(limit, work).await.unwrap_or(Err(Error::StepTimeout { limit }))
            }
            None => work.await,
        }
    }

    async fn act(&self, step: &Step, context: &BTreeMap<String, Value>) -> Result<Outcome, Error> {
        let render = |template: &Template| self.pipeline.render(template, context);
        match &step.action {
            Action::Prompt { model, prompt, system, sampling } => {
                let system = system.as_ref().map(render).transpose()?.map(Message::system);
                let messages = system.into_iter().chain([Message::user(render(prompt)?)]).collect();
                let request = GenerateRequest::chat(messages).with_sampling(sampling.clone());
                self.ask(&step.id, &render(model)?, request).await
            }
            Action::Modulate { model, text, tone, sampling } => {
                let request = tone::request(&render(text)?, &render(tone)?, sampling.clone());
                self.ask(&step.id, &render(model)?, request).await
            }
            Action::Route { text } => self.route(&step.id, &render(text)?).await,
        }
    }

    async fn ask(&self, step: &StepId, model: &str, request: GenerateRequest) -> Result<Outcome, Error> {
        let unknown = |_| Error::UnknownModel { model: model.to_owned(), nearest: None };
        let model: ModelName = model.trim().parse().map_err(unknown)?;
        self.tell(PipelineEvent::StepStarted { step: step.clone(), model: Some(model.clone()) }).await;
        let mut stream = self.models.generate(&model, request, self.options).await?;
        let mut whole = String::new();
        while let Some(event) = stream.next().await {
            match event? {
                AnswerEvent::Text(text) => {
                    whole.push_str(&text);
                    self.tell(PipelineEvent::StepText { step: step.clone(), text }).await;
                }
                AnswerEvent::Done(answer) => {
                    return Ok(Outcome {
                        model: Some(model),
                        text: whole,
                        answer: Some(answer),
                        routing: None,
                    });
                }
            }
        }
        // A stream's contract is to end with Done or an error; one that does neither belongs to a pool that is gone.
        Err(Error::ShuttingDown)
    }

    async fn route(&self, step: &StepId, text: &str) -> Result<Outcome, Error> {
        self.tell(PipelineEvent::StepStarted { step: step.clone(), model: None }).await;
        let none = || Error::NoRoute { message: "no router is configured".to_owned() };
        let router = self.router.as_ref().ok_or_else(none)?;
        let routing = router.route(text, &*self.models, self.options).await?;
        let Some(model) = routing.model else { return Err(Error::NoRoute { message: routing.reason }) };
        let report = RouteReport { label: routing.label, scores: routing.scores, reason: routing.reason };
        Ok(Outcome { model: Some(model), text: String::new(), answer: None, routing: Some(report) })
    }

    async fn tell(&self, event: PipelineEvent) {
        // The receiver lives in the run that polls this step: it cannot be gone.
        let _read = self.events.send(event).await;
    }
}

impl Action {
    fn kind(&self) -> &'static str {
        match self {
            Self::Prompt { .. } => "prompt",
            Self::Modulate { .. } => "modulate",
            Self::Route { .. } => "route",
        }
    }
}

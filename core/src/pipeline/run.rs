use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use minijinja::context;
use minijinja::value::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::compile::{Pipeline, Step};
use super::report::{PipelineEvent, PipelineReport, StepReport};
use super::step::{Feed, Runner, Said};
use crate::answer::{CallOptions, Models};
use crate::audio::Audio;
use crate::error::Error;
use crate::image::Image;
use crate::router::Router;
use crate::units::ModelName;

/// What a run is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Input {
    /// `{{ input.text }}`. It is data: nothing in it is taken for a template.
    pub text: Option<String>,
    /// What `transcribe` hears.
    pub audio: Option<Audio>,
    /// What `describe` sees.
    pub image: Option<Image>,
}

impl Input {
    /// Text alone.
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: Some(text.into()), ..Self::default() }
    }

    /// The same input with audio.
    #[must_use]
    pub fn with_audio(mut self, audio: Audio) -> Self {
        self.audio = Some(audio);
        self
    }

    /// The same input with an image.
    #[must_use]
    pub fn with_image(mut self, image: Image) -> Self {
        self.image = Some(image);
        self
    }
}

/// A run: any number of events, then [`PipelineEvent::Done`] or one error. Dropping it stops all its steps.
pub type PipelineStream = Pin<Box<dyn Stream<Item = Result<PipelineEvent, Error>> + Send>>;

/// Events of running steps that may wait for their reader; a slow reader slows the models down.
const UNREAD: usize = 16;

impl Pipeline {
    /// Runs the pipeline. A step starts when all it refers to have ended, so steps that do not need each other run at
    /// once; one that says another's text again starts with its first sentence. Each step makes one request at a time and
    /// holds no model while it waits for another.
    ///
    /// Before any step, what the input lacks is an error, and so is a model that can never fit the budget. The models of the
    /// steps that come next are made ready meanwhile, as far as there is room.
    pub fn run(
        self: &Arc<Self>,
        input: &Input,
        models: Arc<dyn Models>,
        router: Option<Arc<Router>>,
        options: CallOptions,
    ) -> PipelineStream {
        let (events, unread) = mpsc::channel(UNREAD);
        let text = input.text.as_deref().unwrap_or_default();
        let started = Instant::now();
        let run = Run {
            context: BTreeMap::from([("input".to_owned(), context! { text => text })]),
            waiting: (0..self.steps.len()).collect(),
            runner: Runner {
                pipeline: Arc::clone(self),
                input: Arc::new(input.clone()),
                models,
                router,
                options,
                events,
                started,
            },
            started,
            begun: false,
            running: FuturesUnordered::new(),
            feeds: BTreeMap::new(),
            ahead: FuturesUnordered::new(),
            made_ready: BTreeSet::new(),
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
    /// Whether it was found that it can go at all.
    begun: bool,
    waiting: Vec<usize>,
    running: FuturesUnordered<BoxFuture<'static, (usize, Result<StepReport, Error>)>>,
    /// What running steps say, for those that follow them.
    feeds: BTreeMap<usize, Feed>,
    /// Models of later steps that are being made ready, and all that were.
    ahead: FuturesUnordered<BoxFuture<'static, ()>>,
    made_ready: BTreeSet<ModelName>,
    reports: BTreeMap<usize, StepReport>,
    unread: mpsc::Receiver<PipelineEvent>,
    /// What the reader gets next; an error is the last of it.
    ready: VecDeque<Result<PipelineEvent, Error>>,
    ended: bool,
}

impl Run {
    async fn next(&mut self) -> Option<Result<PipelineEvent, Error>> {
        if !self.begun {
            self.begun = true;
            match self.runner.clone().can_go().await {
                Ok(()) => self.end_if_done(),
                Err(error) => self.end(Err(error)),
            }
        }
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            self.start_steps();
            tokio::select! {
                biased;
                Some(event) = self.unread.recv() => {
                    self.make_ready(&event);
                    return Some(Ok(event));
                }
                Some((place, result)) = self.running.next() => {
                    // What the steps said last may still be on its way to the reader.
                    while let Ok(event) = self.unread.try_recv() {
                        self.ready.push_back(Ok(event));
                    }
                    match result {
                        Ok(report) => self.on_ended(place, report),
                        Err(error) => self.end(Err(error)),
                    }
                }
                Some(()) = self.ahead.next() => {}
            }
        }
    }

    fn start_steps(&mut self) {
        let pipeline = Arc::clone(&self.runner.pipeline);
        let mut place = 0;
        while place < pipeline.steps.len() {
            let step = &pipeline.steps[place];
            let startable = self.waiting.contains(&place) && self.can_start(step);
            if startable {
                self.waiting.retain(|waiting| *waiting != place);
                self.start(place, step);
                // One before it may follow it.
                place = 0;
            } else {
                place += 1;
            }
        }
    }

    fn can_start(&self, step: &Step) -> bool {
        let follows = |source| step.follows == Some(source) && self.feeds.contains_key(&source);
        step.after.iter().all(|source| self.reports.contains_key(source) || follows(*source))
    }

    fn start(&mut self, place: usize, step: &Step) {
        // Where the other one has ended already, its text is taken from its report.
        let runs = |source: &usize| !self.reports.contains_key(source);
        let feed = step.follows.filter(runs).and_then(|source| self.feeds.get(&source).cloned());
        let (runner, context, said) = (self.runner.clone(), self.context.clone(), Said::new());
        self.feeds.insert(place, said.feed());
        self.running.push(async move { (place, runner.step(place, &context, feed, said).await) }.boxed());
    }

    /// Has the models of the steps that come directly after one made ready, once its own says something: before that, it may
    /// need the room itself.
    fn make_ready(&mut self, event: &PipelineEvent) {
        let PipelineEvent::StepText { step, .. } = event else { return };
        let steps = &self.runner.pipeline.steps;
        let Some((place, step)) = steps.iter().enumerate().find(|(_, own)| own.id == *step) else { return };
        for next in steps {
            let comes_next = next.after.contains(&place) && next.when.is_none();
            let Some(model) =
                next.model.clone().filter(|model| comes_next && step.model.as_ref() != Some(model))
            else {
                continue;
            };
            if self.made_ready.insert(model.clone()) {
                let models = Arc::clone(&self.runner.models);
                self.ahead.push(async move { models.prepare(&model).await }.boxed());
            }
        }
    }

    fn on_ended(&mut self, place: usize, report: StepReport) {
        self.context.insert(report.id.to_string(), as_value(&report));
        self.ready.push_back(Ok(PipelineEvent::StepDone(Box::new(report.clone()))));
        self.reports.insert(place, report);
        self.end_if_done();
    }

    fn end_if_done(&mut self) {
        if self.reports.len() == self.runner.pipeline.steps.len() {
            self.end(Ok(PipelineEvent::Done(self.report())));
        }
    }

    fn end(&mut self, last: Result<PipelineEvent, Error>) {
        self.ended = true;
        self.ready.push_back(last);
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

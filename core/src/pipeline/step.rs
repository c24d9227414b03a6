//! Runs single steps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use minijinja::value::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::compile::{Action, Pipeline, Step, Template};
use super::report::{PipelineEvent, RouteReport, StepReport};
use super::run::Input;
use super::sentences::Sentences;
use crate::answer::{Answer, AnswerEvent, AnswerStream, CallOptions, Models};
use crate::error::Error;
use crate::request::{FinishReason, GenerateRequest, Message, Sampling, TranscribeRequest};
use crate::router::{Router, Routing};
use crate::tone::Tone;
use crate::units::{ModelName, StepId};

/// What steps are run with.
#[derive(Clone)]
pub(super) struct Runner {
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) input: Arc<Input>,
    pub(super) models: Arc<dyn Models>,
    pub(super) router: Option<Arc<Router>>,
    pub(super) options: CallOptions,
    pub(super) events: mpsc::Sender<PipelineEvent>,
    /// When the run started.
    pub(super) started: Instant,
}

/// What a step has said so far, for those who take its text as it comes.
#[derive(Clone, Debug, Default)]
pub(super) struct Spoken {
    /// What was said in earlier attempts is void, because of this failure.
    attempt: u32,
    failure: Option<String>,
    text: String,
    /// Whether that is all.
    ended: bool,
}

/// Another step's text as it comes. It never holds that step up, which may be what this one waits for: a step that waits for
/// room may wait for the other one's model to be idle. Its end without [`Spoken::ended`] is that of the whole run.
pub(super) type Feed = watch::Receiver<Spoken>;

/// What a step has said, and when.
pub(super) struct Said {
    spoken: watch::Sender<Spoken>,
    first: Option<Instant>,
    /// When the step's model was first asked, of which the reader was told.
    announced: Option<Instant>,
    attempt: u32,
}

impl Said {
    pub(super) fn new() -> Self {
        Self { spoken: watch::Sender::default(), first: None, announced: None, attempt: 1 }
    }

    /// Where others take its text.
    pub(super) fn feed(&self) -> Feed {
        self.spoken.subscribe()
    }

    fn push(&mut self, text: &str) {
        self.first.get_or_insert_with(Instant::now);
        self.spoken.send_modify(|spoken| spoken.text.push_str(text));
    }

    /// What was said is void: something else is said.
    fn begin_again(&mut self, failure: &str, text: &str) {
        self.first = (!text.is_empty()).then(Instant::now);
        self.spoken.send_modify(|spoken| {
            spoken.attempt += 1;
            spoken.failure = Some(failure.to_owned());
            text.clone_into(&mut spoken.text);
        });
    }

    fn is_silent(&self) -> bool {
        self.spoken.borrow().text.is_empty()
    }

    fn end(&self) -> String {
        self.spoken.send_modify(|spoken| spoken.ended = true);
        self.spoken.borrow().text.clone()
    }
}

/// What a step's action gives besides text.
struct Outcome {
    model: Option<ModelName>,
    answer: Option<Answer>,
    routing: Option<RouteReport>,
}

impl Runner {
    /// Whether the input is what the pipeline takes, and every model that the file names can ever be ready.
    pub(super) async fn can_go(&self) -> Result<(), Error> {
        let Self { pipeline, input, models, .. } = self;
        let wanted = [
            (pipeline.input.text, input.text.is_some(), "text"),
            (pipeline.input.audio, input.audio.is_some(), "audio"),
            (pipeline.input.image, input.image.is_some(), "an image"),
        ];
        if let Some((_, _, what)) = wanted.into_iter().find(|(wanted, given, _)| *wanted && !*given) {
            return Err(Error::MissingInput { pipeline: pipeline.name.clone(), what });
        }
        for step in &pipeline.steps {
            if let Some(model) = &step.model {
                models.can_fit(model).await.map_err(|error| self.failed(step, error))?;
            }
        }
        Ok(())
    }

    pub(super) async fn step(
        &self,
        place: usize,
        context: &BTreeMap<String, Value>,
        mut feed: Option<Feed>,
        mut said: Said,
    ) -> Result<StepReport, Error> {
        let (step, began) = (&self.pipeline.steps[place], Instant::now());
        let mut report = StepReport {
            id: step.id.clone(),
            kind: step.action.kind(),
            model: None,
            text: String::new(),
            skipped: false,
            error: None,
            answer: None,
            routing: None,
            attempts: 0,
            started_ms: self.milliseconds(began),
            first_text_ms: None,
            duration_ms: 0,
        };
        let wanted = step.when.as_ref().map(|when| self.pipeline.render(when, context)).transpose();
        if wanted.map_err(|error| self.failed(step, error))?.is_some_and(|rendered| rendered.is_empty()) {
            report.skipped = true;
            said.end();
            return Ok(report);
        }
        match (self.attempts(step, context, &mut feed, &mut said).await, &step.fallback) {
            (Ok(outcome), _) => {
                report.model = outcome.model;
                report.answer = outcome.answer;
                report.routing = outcome.routing;
            }
            (Err(error), Some(fallback)) => {
                tracing::warn!(pipeline = %self.pipeline.name, step = %step.id, %error, "the step's fallback stands in");
                let text =
                    self.pipeline.render(fallback, context).map_err(|error| self.failed(step, error))?;
                said.begin_again(&error.to_string(), &text);
                report.error = Some(error.to_string());
            }
            (Err(error), None) => return Err(self.failed(step, error)),
        }
        report.text = said.end();
        report.attempts = said.attempt;
        report.first_text_ms = said.first.map(|first| self.milliseconds(first));
        // One that follows another waits for its first sentence.
        let started = said.announced.unwrap_or(began);
        report.started_ms = self.milliseconds(started);
        report.duration_ms = started.elapsed().as_millis() as u64;
        Ok(report)
    }

    pub(super) fn failed(&self, step: &Step, error: Error) -> Error {
        Error::Step { pipeline: self.pipeline.name.clone(), step: step.id.clone(), source: Box::new(error) }
    }

    fn milliseconds(&self, at: Instant) -> u64 {
        at.duration_since(self.started).as_millis() as u64
    }

    /// The step's action, as often as its configuration says where it fails in a way that may pass.
    async fn attempts(
        &self,
        step: &Step,
        context: &BTreeMap<String, Value>,
        feed: &mut Option<Feed>,
        said: &mut Said,
    ) -> Result<Outcome, Error> {
        // The time of a step that follows another one is that of each of its requests: the other one's is not its own.
        let limit = step.timeout.filter(|_| feed.is_none());
        loop {
            let act = self.act(step, context, feed.as_mut(), said);
            let error = match within(limit, act).await {
                Ok(outcome) => return Ok(outcome),
                Err(error) if said.attempt <= step.retry && error.may_pass() => error,
                Err(error) => return Err(error),
            };
            self.begin_again(step, said, &error.to_string()).await;
        }
    }

    /// What a step has said is void: it begins again.
    async fn begin_again(&self, step: &Step, said: &mut Said, error: &str) {
        said.attempt += 1;
        said.begin_again(error, "");
        let (step, attempt, error) = (step.id.clone(), said.attempt, error.to_owned());
        self.tell(PipelineEvent::StepRetried { step, attempt, error }).await;
    }

    async fn act(
        &self,
        step: &Step,
        context: &BTreeMap<String, Value>,
        feed: Option<&mut Feed>,
        said: &mut Said,
    ) -> Result<Outcome, Error> {
        let render = |template: &Template| self.pipeline.render(template, context);
        let instructions = |rendered: Option<String>| rendered.map(Message::system);
        match &step.action {
            Action::Prompt { model, prompt, system, sampling } => {
                let system = instructions(system.as_ref().map(render).transpose()?);
                let messages = system.into_iter().chain([Message::user(render(prompt)?)]).collect();
                let request = GenerateRequest::chat(messages).with_sampling(sampling.clone());
                self.ask(&step.id, &named(&render(model)?)?, request, said).await
            }
            Action::Describe { model, prompt, system, sampling } => {
                let image = self.input.image.clone().ok_or_else(|| self.lacks("an image"))?;
                let question = Message::user(render(prompt)?).with_images(vec![image]);
                let system = instructions(system.as_ref().map(render).transpose()?);
                let request = GenerateRequest::chat(system.into_iter().chain([question]).collect());
                let request = request.with_sampling(sampling.clone());
                self.ask(&step.id, &named(&render(model)?)?, request, said).await
            }
            Action::Transcribe { model, language, sampling } => {
                let audio = self.input.audio.clone().ok_or_else(|| self.lacks("audio"))?;
                let request = TranscribeRequest {
                    language: language.clone(),
                    ..TranscribeRequest::new(audio).with_sampling(sampling.clone())
                };
                let model = named(&render(model)?)?;
                self.announce(&step.id, Some(&model), said).await;
                let stream = self.models.transcribe(&model, request, self.options).await?;
                let answer = self.listen(&step.id, stream, said).await?;
                Ok(Outcome { model: Some(model), answer: Some(answer), routing: None })
            }
            Action::Modulate { model, text, tone, sampling } => {
                let tone = self.tone(render(tone)?.trim(), sampling)?;
                let model = named(&render(model)?)?;
                match feed {
                    Some(feed) => self.follow(step, (&model, &tone), feed, said).await,
                    None => self.ask(&step.id, &model, tone.request(&render(text)?), said).await,
                }
            }
            Action::Route { text } => self.route(&step.id, &render(text)?, said).await,
        }
    }

    fn lacks(&self, what: &'static str) -> Error {
        Error::MissingInput { pipeline: self.pipeline.name.clone(), what }
    }

    /// The tone of that name, with the step's own way to choose tokens where it has one.
    fn tone(&self, name: &str, sampling: &Sampling) -> Result<Tone, Error> {
        let tones = &self.pipeline.tones;
        let unknown = || Error::UnknownTone {
            tone: name.to_owned(),
            known: tones.names().map(str::to_owned).collect(),
        };
        let tone = tones.get(name).ok_or_else(unknown)?;
        let sampling = if *sampling == Sampling::default() { &tone.sampling } else { sampling };
        Ok(Tone { sampling: sampling.clone(), ..tone.clone() })
    }

    async fn ask(
        &self,
        step: &StepId,
        model: &ModelName,
        request: GenerateRequest,
        said: &mut Said,
    ) -> Result<Outcome, Error> {
        self.announce(step, Some(model), said).await;
        let stream = self.models.generate(model, request, self.options).await?;
        let answer = self.listen(step, stream, said).await?;
        Ok(Outcome { model: Some(model.clone()), answer: Some(answer), routing: None })
    }

    /// Says an answer as it comes.
    async fn listen(
        &self,
        step: &StepId,
        mut stream: AnswerStream,
        said: &mut Said,
    ) -> Result<Answer, Error> {
        while let Some(event) = stream.next().await {
            match event? {
                AnswerEvent::Text(text) => self.say(step, text, said).await,
                AnswerEvent::Done(answer) => return Ok(answer),
            }
        }
        // A stream's contract is to end with Done or an error; one that does neither belongs to a pool that is gone.
        Err(Error::ShuttingDown)
    }

    /// Says another step's text again, sentence by sentence as it comes; as a whole, where the tone needs that. White space
    /// between sentences stays as it was.
    async fn follow(
        &self,
        step: &Step,
        (model, tone): (&ModelName, &Tone),
        feed: &mut Feed,
        said: &mut Said,
    ) -> Result<Outcome, Error> {
        let (mut sentences, mut unsaid, mut pause) = (Sentences::default(), String::new(), String::new());
        let (mut attempt, mut taken, mut whole) = (feed.borrow().attempt, 0, None::<Answer>);
        loop {
            let Spoken { attempt: now, failure, text, ended: is_end } = feed.borrow_and_update().clone();
            if attempt != now {
                if !said.is_silent() {
                    self.begin_again(step, said, failure.as_deref().unwrap_or_default()).await;
                }
                (sentences, unsaid, pause) = (Sentences::default(), String::new(), String::new());
                (attempt, taken, whole) = (now, 0, None);
            }
            unsaid.push_str(&sentences.push(&text[taken..]).concat());
            taken = text.len();
            if is_end {
                unsaid.extend(std::mem::take(&mut sentences).finish());
            }
            let text = if tone.whole && !is_end { String::new() } else { std::mem::take(&mut unsaid) };
            if !text.trim().is_empty() {
                let said_again = self.say_again(step, (model, tone), &text, &mut pause, said);
                let answer = within(step.timeout, said_again).await?;
                whole = Some(match whole {
                    Some(before) => add(before, answer),
                    None => answer,
                });
            }
            if is_end {
                return Ok(Outcome { model: Some(model.clone()), answer: whole, routing: None });
            }
            feed.changed().await.map_err(|_| Error::ShuttingDown)?;
        }
    }

    /// Says sentences again, after the white space that was behind those before them.
    async fn say_again(
        &self,
        step: &Step,
        (model, tone): (&ModelName, &Tone),
        text: &str,
        pause: &mut String,
        said: &mut Said,
    ) -> Result<Answer, Error> {
        self.announce(&step.id, Some(model), said).await;
        let body = text.trim();
        pause.push_str(&text[..text.len() - text.trim_start().len()]);
        let mut stream = self.models.generate(model, tone.request(body), self.options).await?;
        let mut begun = false;
        while let Some(event) = stream.next().await {
            match event? {
                AnswerEvent::Text(text) => {
                    let text = if begun { text.as_str() } else { text.trim_start() };
                    if text.is_empty() {
                        continue;
                    }
                    begun = true;
                    // White space at its end is held back: the source's own comes there.
                    let (kept, held) = text.split_at(text.trim_end().len());
                    if kept.is_empty() {
                        pause.push_str(held);
                    } else {
                        let now = std::mem::replace(pause, held.to_owned()) + kept;
                        self.say(&step.id, now, said).await;
                    }
                }
                AnswerEvent::Done(answer) => {
                    let after = &text[text.trim_end().len()..];
                    *pause = if after.is_empty() { " ".to_owned() } else { after.to_owned() };
                    return Ok(answer);
                }
            }
        }
        Err(Error::ShuttingDown)
    }

    async fn route(&self, step: &StepId, text: &str, said: &mut Said) -> Result<Outcome, Error> {
        self.announce(step, None, said).await;
        let none = || Error::NoRoute { message: "no router is configured".to_owned() };
        let router = self.router.as_ref().ok_or_else(none)?;
        let routing = router.route(text, &*self.models, self.options).await?;
        let Routing { label, rule, model, scores, reason, .. } = routing;
        let Some(model) = model else { return Err(Error::NoRoute { message: reason }) };
        let report = RouteReport { label, rule, scores, reason };
        Ok(Outcome { model: Some(model), answer: None, routing: Some(report) })
    }

    /// Tells the reader once that a step asks its model now.
    async fn announce(&self, step: &StepId, model: Option<&ModelName>, said: &mut Said) {
        if said.announced.is_none() {
            said.announced = Some(Instant::now());
            self.tell(PipelineEvent::StepStarted { step: step.clone(), model: model.cloned() }).await;
        }
    }

    async fn say(&self, step: &StepId, text: String, said: &mut Said) {
        said.push(&text);
        self.tell(PipelineEvent::StepText { step: step.clone(), text }).await;
    }

    async fn tell(&self, event: PipelineEvent) {
        // The receiver lives in the run that polls this step: it cannot be gone.
        let _read = self.events.send(event).await;
    }
}

async fn within<T>(
    limit: Option<Duration>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, work).await.unwrap_or(Err(Error::StepTimeout { limit })),
        None => work.await,
    }
}

fn named(model: &str) -> Result<ModelName, Error> {
    let unknown = |_| Error::UnknownModel { model: model.to_owned(), nearest: None };
    model.trim().parse().map_err(unknown)
}

/// Two answers as one: the first one's way to its first text, what both took, and who served last.
fn add(before: Answer, after: Answer) -> Answer {
    let sum = |a: Option<u32>, b: Option<u32>| Some(a?.saturating_add(b?));
    let seconds = |answer: &Answer| Some(f64::from(answer.completion_tokens?) / answer.tokens_per_second?);
    let completion_tokens = sum(before.completion_tokens, after.completion_tokens);
    let time = seconds(&before).zip(seconds(&after)).map(|(a, b)| a + b);
    let mut provenance = after.provenance;
    provenance.queue_ms = before.provenance.queue_ms;
    provenance.load_ms = before.provenance.load_ms;
    provenance.fallback_reason = before.provenance.fallback_reason.or(provenance.fallback_reason);
    let cut = before.finish_reason == FinishReason::Length;
    Answer {
        provenance,
        finish_reason: if cut { before.finish_reason } else { after.finish_reason },
        truncated: before.truncated || after.truncated,
        prompt_tokens: sum(before.prompt_tokens, after.prompt_tokens),
        cached_tokens: sum(before.cached_tokens, after.cached_tokens),
        tokens_per_second: completion_tokens.zip(time).map(|(tokens, time)| f64::from(tokens) / time),
        completion_tokens,
        ttft_ms: before.ttft_ms.or(after.ttft_ms),
        tool_calls: Vec::new(),
        logprobs: None,
        handovers: before.handovers.into_iter().chain(after.handovers).collect(),
    }
}

impl Action {
    fn kind(&self) -> &'static str {
        match self {
            Self::Prompt { .. } => "prompt",
            Self::Describe { .. } => "describe",
            Self::Transcribe { .. } => "transcribe",
            Self::Modulate { .. } => "modulate",
            Self::Route { .. } => "route",
        }
    }
}

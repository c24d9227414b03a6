use std::collections::VecDeque;

use futures::StreamExt;
use sarai::core::pipeline::StepReport;
use sarai::core::units::{ModelName, StepId};
use sarai::{Error, Input, PipelineEvent, PipelineReport, PipelineStream};

use super::args::{Common, RunArgs};
use super::chat::{INTERACTIVE, or_stdin, summary};
use super::exit::Failure;
use super::files;
use super::output::Output;
use super::session::Session;

/// Letters of the time line's bars.
const BAR: u64 = 40;

pub(super) async fn run(common: &Common, args: &RunArgs, output: &Output) -> Result<(), Failure> {
    let text = match args.text.as_deref() {
        Some(text) => Some(or_stdin(text).await?),
        None => None,
    };
    let audio = args.audio.as_deref().map(files::audio).transpose()?;
    let image = args.image.as_deref().map(files::image).transpose()?;
    let session = Session::open_with_metrics(common, output)?;
    let input = Input { text, audio, image };
    let report = show(session.sarai.run(&args.pipeline, &input, INTERACTIVE)?, output).await?;
    output.note(&format!("\n{}", timeline(&report)));
    output.object(&report)?;
    session.close().await;
    Ok(())
}

/// Shows a run step by step: each step's text under its name, as it comes. Of steps that speak at the same time, one is shown
/// and the others follow when it has ended, with what they have said meanwhile.
pub(super) async fn show(mut run: PipelineStream, output: &Output) -> Result<PipelineReport, Failure> {
    let mut open: VecDeque<Open> = VecDeque::new();
    loop {
        match run.next().await.ok_or(Error::ShuttingDown)?? {
            PipelineEvent::StepStarted { step, model } => {
                open.push_back(Open { step, model, said: String::new(), shown: false, done: None });
            }
            PipelineEvent::StepText { step, text } => {
                if let Some(speaks) = open.iter_mut().find(|open| open.step == step) {
                    speaks.said.push_str(&text);
                }
            }
            PipelineEvent::StepRetried { step, attempt, error } => {
                if let Some(speaks) = open.iter_mut().find(|open| open.step == step) {
                    speaks.said.clear();
                    output.note(&format!("\n{step}: attempt {attempt}, because of: {error}"));
                }
            }
            PipelineEvent::StepDone(report) => match open.iter_mut().find(|open| open.step == report.id) {
                Some(speaks) => speaks.done = Some(report),
                // It was skipped, or failed before its model was asked.
                None => open.push_back(Open {
                    step: report.id.clone(),
                    model: None,
                    said: String::new(),
                    shown: false,
                    done: Some(report),
                }),
            },
            PipelineEvent::Done(report) => return Ok(report),
        }
        while let Some(first) = open.front_mut() {
            if !first.show(output)? {
                break;
            }
            open.pop_front();
        }
    }
}

/// A step that has begun and is not wholly shown.
struct Open {
    step: StepId,
    model: Option<ModelName>,
    /// What is not shown yet.
    said: String,
    /// Whether its name is.
    shown: bool,
    done: Option<Box<StepReport>>,
}

impl Open {
    /// Shows what there is to show; returns whether that is all.
    fn show(&mut self, output: &Output) -> Result<bool, Failure> {
        let bold = anstyle::Style::new() | anstyle::Effects::BOLD;
        if !std::mem::replace(&mut self.shown, true) {
            let model = self.model.as_ref().map(|model| format!(" ({model})")).unwrap_or_default();
            output.note(&format!("{bold}{}{bold:#}{model}", self.step));
        }
        output.text(&std::mem::take(&mut self.said))?;
        let Some(report) = &self.done else { return Ok(false) };
        if let Some(error) = &report.error {
            output.note(&format!("failed, its fallback stands in: {error}"));
            output.text(&report.text)?;
        }
        output.text(if report.text.is_empty() { "" } else { "\n" })?;
        if report.skipped {
            output.note("skipped");
        }
        if let Some(routing) = &report.routing {
            output.note(&routing.reason);
        }
        if let Some(answer) = &report.answer {
            output.note(&summary(answer));
        }
        Ok(true)
    }
}

/// When each step waited, read and spoke, in a line each.
pub(super) fn timeline(report: &PipelineReport) -> String {
    let width = report.steps.iter().map(|step| step.id.as_str().len()).max().unwrap_or(0);
    let scale = report.total_ms.max(1);
    let lines = report.steps.iter().map(|step| {
        let (start, end) = (step.started_ms, step.started_ms + step.duration_ms);
        let first = step.first_text_ms.unwrap_or(end);
        let letter = |at: u64| match at * scale / BAR {
            at if at < start || at > end => ' ',
            at if at < first => '·',
            _ => '█',
        };
        let bar: String = (0..BAR).map(letter).collect();
        let times = if step.skipped { "skipped".to_owned() } else { format!("{first:>6} to {end:>6} ms") };
        format!("{:width$} |{bar}| {times}", step.id.as_str())
    });
    let lines: Vec<String> = lines.collect();
    format!(
        "{}\n{:width$}  · from its start, █ from its first text; {} ms in all",
        lines.join("\n"),
        "",
        report.total_ms
    )
}

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
use super::ps::shorten;
use super::session::Session;
use super::table::table;

/// Letters of the time line's bars.
const BAR: u64 = 40;

pub(super) async fn run(common: &Common, args: &RunArgs, output: &Output) -> Result<(), Failure> {
    let mut input = Input::default();
    if let Some(text) = &args.text {
        input.text = Some(or_stdin(text).await?);
    }
    if let Some(path) = &args.audio {
        input.audio = Some(files::audio(path).await?);
    }
    if let Some(path) = &args.image {
        input.image = Some(files::image(path).await?);
    }
    let session = Session::open_with_metrics(common, output)?;
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
        let event = match run.next().await.ok_or(Error::ShuttingDown).flatten() {
            Ok(event) => event,
            Err(error) => {
                if let Some(first) = open.front_mut() {
                    first.end_line(output)?;
                }
                return Err(error.into());
            }
        };
        match event {
            PipelineEvent::StepStarted { step, model } => open.push_back(Open::new(step, model)),
            PipelineEvent::StepText { step, text } => {
                if let Some(speaks) = open.iter_mut().find(|open| open.step == step) {
                    speaks.said.push_str(&text);
                }
            }
            PipelineEvent::StepRetried { step, attempt, error } => {
                if let Some(speaks) = open.iter_mut().find(|open| open.step == step) {
                    speaks.begin_again(attempt, &error, output)?;
                }
            }
            PipelineEvent::StepDone(report) => match open.iter_mut().find(|open| open.step == report.id) {
                Some(speaks) => speaks.end(report),
                None => {
                    // It was skipped, or failed before its model was asked.
                    let mut silent = Open::new(report.id.clone(), None);
                    silent.end(report);
                    open.push_back(silent);
                }
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
    /// Whether what was shown last goes on in the same line.
    in_line: bool,
    done: Option<Box<StepReport>>,
}

impl Open {
    fn new(step: StepId, model: Option<ModelName>) -> Self {
        Self { step, model, said: String::new(), shown: false, in_line: false, done: None }
    }

    /// What it has said is void. Where that was shown, it is told.
    fn begin_again(&mut self, attempt: u32, error: &str, output: &Output) -> Result<(), Failure> {
        self.said.clear();
        if self.shown {
            self.end_line(output)?;
            output.note(&format!("{} begins again, attempt {attempt}: {error}", self.step));
        }
        Ok(())
    }

    /// The report has all of its text. What was said before its fallback stood in is void.
    fn end(&mut self, report: Box<StepReport>) {
        if !self.shown {
            self.said.clear();
            if report.error.is_none() {
                self.said.push_str(&report.text);
            }
        }
        self.done = Some(report);
    }

    /// Shows what there is to show; returns whether that is all.
    fn show(&mut self, output: &Output) -> Result<bool, Failure> {
        let bold = anstyle::Style::new() | anstyle::Effects::BOLD;
        if !std::mem::replace(&mut self.shown, true) {
            let model = self.model.as_ref().map(|model| format!(" ({model})")).unwrap_or_default();
            output.note(&format!("{bold}{}{bold:#}{model}", self.step));
        }
        if !self.said.is_empty() {
            output.text(&self.said)?;
            self.in_line = !self.said.ends_with('\n');
            self.said.clear();
        }
        let Some(report) = self.done.take() else { return Ok(false) };
        self.end_line(output)?;
        if let Some(error) = &report.error {
            output.note(&format!("failed, its fallback stands in: {error}"));
            output.line(&report.text)?;
        }
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

    fn end_line(&mut self, output: &Output) -> Result<(), Failure> {
        output.text(if std::mem::take(&mut self.in_line) { "\n" } else { "" })
    }
}

/// When each step began, said its first word and ended, and who answered how fast: a line each. Bars above one another ran at the
/// same time.
pub(super) fn timeline(report: &PipelineReport) -> String {
    let mut table =
        table(["STEP", "START", "FIRST TEXT", "END", "", "MODEL", "TOKENS/S", "SERVED BY"], &[1, 2, 3, 6]);
    for step in &report.steps {
        table.add_row(row(step, report.total_ms));
    }
    format!("{table}\n· from its start, █ from its first text; {} ms in all", report.total_ms)
}

fn row(step: &StepReport, total_ms: u64) -> [String; 8] {
    let none = || "-".to_owned();
    let answer = step.answer.as_ref();
    let end = step.started_ms + step.duration_ms;
    let attempts = if step.attempts > 1 { format!(" ({} attempts)", step.attempts) } else { String::new() };
    [
        format!("{}{attempts}", step.id),
        format!("{} ms", step.started_ms),
        step.first_text_ms.map_or_else(none, |first| format!("{first} ms")),
        if step.skipped { "skipped".to_owned() } else { format!("{end} ms") },
        bar(step, total_ms),
        step.model.as_ref().map_or_else(none, ToString::to_string),
        answer.and_then(|answer| answer.tokens_per_second).map_or_else(none, |speed| format!("{speed:.1}")),
        answer.map_or_else(none, |answer| shorten(&answer.provenance.served_by.to_string())),
    ]
}

/// The part of the whole time in which a step ran, and in which it spoke.
fn bar(step: &StepReport, total_ms: u64) -> String {
    let (start, end) = (step.started_ms, step.started_ms + step.duration_ms);
    let first = step.first_text_ms.unwrap_or(end);
    let letter = |at: u64| match at * total_ms.max(1) / BAR {
        at if step.skipped || at < start || at > end => ' ',
        at if at < first => '·',
        _ => '█',
    };
    format!("|{}|", (0..BAR).map(letter).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(id: &str, started_ms: u64, first_text_ms: Option<u64>, duration_ms: u64) -> StepReport {
        StepReport {
            id: id.parse().unwrap(),
            kind: "prompt",
            model: Some("solar".parse().unwrap()),
            text: "hola".to_owned(),
            skipped: false,
            error: None,
            answer: None,
            routing: None,
            attempts: 1,
            started_ms,
            first_text_ms,
            duration_ms,
        }
    }

    #[test]
    fn a_bar_shows_what_part_of_the_run_a_step_waited_and_spoke() {
        let inside = |step: &StepReport| bar(step, 4000).trim_matches('|').to_owned();
        let expert = inside(&step("expert", 0, Some(1000), 3000));
        assert_eq!(expert, format!("{}{}{}", "·".repeat(10), "█".repeat(21), " ".repeat(9)));
        let tone = inside(&step("tone", 2000, Some(2500), 2000));
        assert_eq!(tone, format!("{}{}{}", " ".repeat(20), "·".repeat(5), "█".repeat(15)));
        let silent = inside(&step("pick", 0, None, 100));
        assert_eq!(silent, format!("·█{}", " ".repeat(38)));
        let skipped = StepReport { skipped: true, ..step("pick", 1000, None, 1000) };
        assert_eq!(inside(&skipped), " ".repeat(40));
    }

    #[test]
    fn a_time_line_has_a_row_for_each_step_and_says_who_was_tried_again() {
        let again = StepReport { attempts: 2, ..step("tone", 2000, None, 2000) };
        let report = PipelineReport {
            pipeline: "voice".parse().unwrap(),
            text: "hola".to_owned(),
            steps: vec![step("expert", 0, Some(1000), 3000), again],
            total_ms: 4000,
        };
        let shown = timeline(&report);
        let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..7], ["expert", "0", "ms", "1000", "ms", "3000", "ms"], "{shown}");
        assert_eq!(lines[2][..8], ["tone", "(2", "attempts)", "2000", "ms", "-", "4000", "ms"], "{shown}");
        assert!(shown.ends_with("4000 ms in all"), "{shown}");
    }
}

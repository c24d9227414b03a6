use futures::StreamExt;
use sarai::{Error, Input, PipelineEvent, PipelineReport, PipelineStream};

use super::args::{Common, RunArgs};
use super::chat::{INTERACTIVE, or_stdin, summary};
use super::exit::Failure;
use super::output::Output;
use super::session::Session;

pub(super) async fn run(common: &Common, args: &RunArgs, output: &Output) -> Result<(), Failure> {
    let session = Session::open_with_metrics(common, output)?;
    let missing = || Failure::Usage(format!("pipeline {} needs --text", args.pipeline));
    let text = or_stdin(args.text.as_deref().ok_or_else(missing)?).await?;
    let report = show(session.sarai.run(&args.pipeline, &Input { text }, INTERACTIVE)?, output).await?;
    output.object(&report)?;
    session.close().await;
    Ok(())
}

/// Shows a run step by step: each step's text under its name. Steps that run at once are shown when they end.
pub(super) async fn show(mut run: PipelineStream, output: &Output) -> Result<PipelineReport, Failure> {
    let bold = anstyle::Style::new() | anstyle::Effects::BOLD;
    // The step whose text is being shown, and whether any of it was.
    let mut open: Option<(sarai::core::units::StepId, bool)> = None;
    loop {
        match run.next().await.ok_or(Error::ShuttingDown)?? {
            PipelineEvent::StepStarted { step, model } => {
                if open.is_none() {
                    let model = model.map(|model| format!(" ({model})")).unwrap_or_default();
                    output.note(&format!("{bold}{step}{bold:#}{model}"));
                    open = Some((step, false));
                }
            }
            PipelineEvent::StepText { step, text } => {
                if let Some((_, said)) = open.as_mut().filter(|(shown, _)| *shown == step) {
                    output.text(&text)?;
                    *said = true;
                }
            }
            PipelineEvent::StepDone(report) => {
                match open.take() {
                    Some((shown, said)) if shown == report.id => {
                        output.text(if said { "\n" } else { "" })?;
                    }
                    other => {
                        // It ran beside the one that is being shown.
                        output.note(&format!("\n{bold}{}{bold:#}", report.id));
                        output.line(&report.text)?;
                        open = other;
                    }
                }
                if report.skipped {
                    output.note("skipped");
                }
                if let Some(routing) = &report.routing {
                    output.note(&routing.reason);
                }
                if let Some(error) = &report.error {
                    output.note(&format!("failed, its fallback stands in: {error}"));
                    output.line(&report.text)?;
                }
                if let Some(answer) = &report.answer {
                    output.note(&summary(answer));
                }
            }
            PipelineEvent::Done(report) => return Ok(report),
        }
    }
}

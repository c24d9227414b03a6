//! Speech to text, an answer, and its tone: a whole pipeline, with what each step says as it comes.
//!
//! On the demo's toy models:
//! `cargo run --release --example voice -- config/demo.yaml config/demo/question.wav`

#![expect(clippy::print_stdout, reason = "a program for a terminal")]

use futures::StreamExt;
use sarai::{Audio, CallOptions, Input, PipelineEvent, Sarai};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let sarai = Sarai::from_file(arguments.next().ok_or("name a configuration")?).await?;
    let audio = Audio::new(std::fs::read(arguments.next().ok_or("name an audio file")?)?)?;

    let mut run = sarai.run("voice", &Input::default().with_audio(audio), CallOptions::default())?;
    while let Some(event) = run.next().await {
        match event? {
            PipelineEvent::StepStarted { step, model } => println!("[{step} asks {model:?}]"),
            PipelineEvent::StepText { step, text } => println!("{step}: {text}"),
            PipelineEvent::StepRetried { step, error, .. } => println!("[{step} begins again: {error}]"),
            PipelineEvent::StepDone(report) => println!("[{} took {} ms]", report.id, report.duration_ms),
            PipelineEvent::Done(report) => println!("\n{}\n({} ms)", report.text, report.total_ms),
        }
    }
    sarai.shutdown(std::time::Duration::from_secs(10)).await;
    Ok(())
}

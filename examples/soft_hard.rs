//! A warm sentence at once, while the answer is worked on; then the answer, sentence by sentence, in the same voice.
//!
//! On the demo's toy models:
//! `cargo run --release --example soft_hard -- config/demo.yaml "Why was my model evicted?"`

#![expect(clippy::print_stdout, reason = "a program for a terminal")]

use std::io::Write;

use futures::StreamExt;
use sarai::{CallOptions, Input, PipelineEvent, Sarai};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let sarai = Sarai::from_file(arguments.next().ok_or("name a configuration")?).await?;
    let question = arguments.next().ok_or("ask something")?;

    let mut run = sarai.run("soft_hard", &Input::text(question), CallOptions::default())?;
    while let Some(event) = run.next().await {
        match event? {
            // What the expert writes is the tone's to say.
            PipelineEvent::StepText { step, text } if step.as_str() != "expert" => {
                print!("{text}");
                std::io::stdout().flush()?;
            }
            PipelineEvent::StepDone(report) if report.id.as_str() == "opening" => println!(),
            PipelineEvent::Done(report) => println!("\n({} ms)", report.total_ms),
            _ => {}
        }
    }
    sarai.shutdown(std::time::Duration::from_secs(10)).await;
    Ok(())
}

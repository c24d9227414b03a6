//! One answer in several tones, all at once: requests on one model share its steps.
//!
//! On the demo's toy models:
//! `cargo run --release --example tone -- config/demo.yaml "The build failed again."`

#![expect(clippy::print_stdout, reason = "a program for a terminal")]

use futures::StreamExt;
use sarai::{AnswerEvent, CallOptions, Sarai};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let sarai = Sarai::from_file(arguments.next().ok_or("name a configuration")?).await?;
    let text = arguments.next().unwrap_or_else(|| "The build failed again.".to_owned());

    let tones: Vec<String> = sarai.tones().names().map(str::to_owned).collect();
    let (sarai, text) = (&sarai, &text);
    let said = tones.iter().map(|tone| async move {
        let mut answer = sarai.modulate("lfm2", text, tone, CallOptions::default()).await?;
        let mut whole = String::new();
        while let Some(event) = answer.next().await {
            if let AnswerEvent::Text(text) = event? {
                whole.push_str(&text);
            }
        }
        Ok::<_, sarai::Error>(format!("{tone}: {whole}"))
    });
    for line in futures::future::try_join_all(said).await? {
        println!("{line}");
    }
    sarai.shutdown(std::time::Duration::from_secs(10)).await;
    Ok(())
}

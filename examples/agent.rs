//! An assistant's loop on a pool of models: the router picks who answers, the conversation goes on, memory is watched.
//!
//! Run it on the demo's toy models:
//! `cargo run --release --example agent -- config/demo.yaml`

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

use std::io::{BufRead, Write};
use std::time::Duration;

use futures::StreamExt;
use sarai::{AnswerEvent, CallOptions, GenerateRequest, Message, Phase, PoolEvent, Priority, Sarai};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).unwrap_or_else(|| "config/sarai.yaml".into());
    let sarai = Sarai::from_file(path).await?;

    // What the pool does meanwhile.
    let mut events = sarai.pool().events();
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                PoolEvent::Slot(change) if matches!(change.to, Phase::Ready | Phase::Unloading) => {
                    eprintln!("[{} {}, {} used]", change.model, change.to.as_str(), change.used);
                }
                PoolEvent::Fallback { model, reason, .. } => eprintln!("[{model} falls back: {reason}]"),
                _ => {}
            }
        }
    });

    // Someone watches the cursor: these requests go before others.
    let wait_timeout = Some(Duration::from_secs(120));
    let options = CallOptions { priority: Priority::Interactive, wait_timeout, ..CallOptions::default() };
    let mut conversation = vec![Message::system("You are a kind assistant. Answer in the user's language.")];
    for line in std::io::stdin().lock().lines() {
        conversation.push(Message::user(line?));
        match answer(&sarai, &conversation, options).await {
            Ok(said) => conversation.push(Message::assistant(said)),
            // The pool is as good as before: the next question may be answered.
            Err(error) => {
                conversation.pop();
                eprintln!("{error}");
            }
        }
    }
    sarai.pool().shutdown(Duration::from_secs(10)).await;
    Ok(())
}

/// Asks the model that the router picks, shows its text as it comes, and gives it whole.
async fn answer(
    sarai: &Sarai,
    conversation: &[Message],
    options: CallOptions,
) -> Result<String, sarai::Error> {
    let question = conversation.last().map_or("", |message| message.content.as_str());
    let picked = sarai.route(question, options).await?.model;
    let model = sarai.pool().handle(picked.as_ref().map_or("lfm2", |model| model.as_str()))?;
    let mut answer = model.generate(GenerateRequest::chat(conversation.to_vec()), options).await?;
    let mut said = String::new();
    while let Some(event) = answer.next().await {
        match event? {
            AnswerEvent::Text(text) => {
                print!("{text}");
                let _ = std::io::stdout().flush();
                said.push_str(&text);
            }
            AnswerEvent::Done(end) => println!("\n({})", end.provenance.served_by),
        }
    }
    Ok(said)
}

//! An assistant's loop on a pool of models: the router picks who answers, small talk is softened, memory is watched.
//!
//! Run it on the demo's models, which `sarai demo` makes:
//! `cargo run --release --example agent -- config/demo.yaml`

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use sarai::{AnswerEvent, CallOptions, GenerateRequest, Message, Phase, PoolEvent, Priority, Sarai};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).map_or_else(|| "config/sarai.yaml".into(), PathBuf::from);
    let sarai = Sarai::from_file(&path).await?;
    let pool = sarai.pool();

    // What the pool does meanwhile: loads, evictions, fallbacks.
    let mut events = pool.events();
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                PoolEvent::Slot(change) if matches!(change.to, Phase::Ready | Phase::Unloading) => {
                    let _ = writeln!(
                        std::io::stderr(),
                        "[{} {}, {} used]",
                        change.model,
                        change.to.as_str(),
                        change.used
                    );
                }
                PoolEvent::Fallback { model, reason, .. } => {
                    let _ = writeln!(std::io::stderr(), "[{model} falls back: {reason}]");
                }
                _ => {}
            }
        }
    });
    // Someone watches the cursor: these requests go before others.
    let options =
        CallOptions { priority: Priority::Interactive, wait_timeout: Some(Duration::from_secs(120)) };
    let mut conversation = vec![Message::system("You are a kind assistant. Answer in the user's language.")];
    for line in std::io::stdin().lock().lines() {
        conversation.push(Message::user(line?));
        match answer(&sarai, &conversation, options).await {
            Ok(said) => conversation.push(Message::assistant(said)),
            // The pool and the other models are as good as before: the next question may be answered.
            Err(error) => {
                conversation.pop();
                writeln!(std::io::stderr(), "{error}")?;
            }
        }
    }
    pool.shutdown(Duration::from_secs(10)).await;
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
    let (mut said, mut stdout) = (String::new(), std::io::stdout());
    while let Some(event) = answer.next().await {
        match event? {
            AnswerEvent::Text(text) => {
                // A terminal that is gone ends the loop at the next line.
                let _ = write!(stdout, "{text}").and_then(|()| stdout.flush());
                said.push_str(&text);
            }
            AnswerEvent::Done(end) => {
                let _ = writeln!(stdout, "\n({})", end.provenance.served_by);
            }
        }
    }
    Ok(said)
}

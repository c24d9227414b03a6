//! An assistant's loop on a pool of models: the router picks who answers, small talk is softened, memory is watched.
//!
//! Run it on the demo's models, which `sarai demo` makes:
//! `cargo run --release --example agent -- config/demo.yaml`

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use sarai::core::scheduler::Phase;
use sarai::{AnswerEvent, CallOptions, GenerateRequest, Message, PoolEvent, Priority, Sarai};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).map_or_else(|| "config/sarai.yaml".into(), PathBuf::from);
    let sarai = Sarai::from_file(&path)?;
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
    for (model, loaded) in pool.load_residents().await {
        loaded.map_err(|error| format!("{model}: {error}"))?;
    }

    // Someone watches the cursor: these requests go before others.
    let options =
        CallOptions { priority: Priority::Interactive, wait_timeout: Some(Duration::from_secs(120)) };
    let mut conversation = vec![Message::system("You are a kind assistant. Answer in the user's language.")];
    for line in std::io::stdin().lock().lines() {
        let text = line?;
        let model = match sarai.router() {
            Some(router) => router.route(&text, pool, options).await?.model,
            None => None,
        };
        let model = pool.handle(model.as_ref().map_or("lfm2", |model| model.as_str()))?;
        conversation.push(Message::user(text));
        let mut answer = model.generate(GenerateRequest::chat(conversation.clone()), options).await?;
        let mut said = String::new();
        let mut stdout = std::io::stdout();
        while let Some(event) = answer.next().await {
            match event? {
                AnswerEvent::Text(text) => {
                    write!(stdout, "{text}")?;
                    stdout.flush()?;
                    said.push_str(&text);
                }
                AnswerEvent::Done(end) => writeln!(stdout, "\n({})", end.provenance.served_by)?,
            }
        }
        conversation.push(Message::assistant(said));
    }
    pool.shutdown(Duration::from_secs(10)).await;
    Ok(())
}

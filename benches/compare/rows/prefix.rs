//! Requests that share a system prompt.

use sarai::{GenerateRequest, Message};
use sarai_support::gguf::Shape;

use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::{Result, prompt};

const REQUESTS: u64 = 8;
const SYSTEM: usize = 500;
const QUESTION: usize = 16;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let path = bench.shapes.file(Shape::Lfm2)?;
    let ours = Ours::start(bench, &[Model::llm("model", path, Weights::Default)], 1).await?;
    let system = Message::system(prompt::words(SYSTEM, 0));
    let (mut computed, mut all) = (0, 0);
    for request in 0..REQUESTS {
        let question = Message::user(prompt::words(QUESTION, request));
        let messages = GenerateRequest::chat(vec![system.clone(), question]);
        let (_, answer) = ours.ask("model", messages, 4).await?;
        let tokens = u64::from(answer.prompt_tokens.ok_or("the answer does not count its prompt")?);
        // Read from the answer as it is shown: an engine that reuses nothing has no such field.
        let cached = serde_json::to_value(&answer)?["cached_tokens"].as_u64().unwrap_or(0);
        all += tokens;
        computed += tokens.saturating_sub(cached);
    }
    ours.stop().await;
    Ok(vec![Figure {
        what: "8 requests below a system prompt of 500 tokens, prompt tokens computed".to_owned(),
        unit: "tokens",
        ours: computed as f64,
        against: "all prompt tokens".to_owned(),
        theirs: all as f64,
        bar: Bar::RatioAtMost(0.2),
    }])
}

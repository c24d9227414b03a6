//! Requests that share a system prompt.

use sarai::{GenerateRequest, Message};
use sarai_support::gguf::Shape;

use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::statistics::median;
use crate::{Result, prompt};

const REQUESTS: u64 = 8;
const SYSTEM: usize = 500;
const QUESTION: usize = 16;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let path = bench.shapes.file(Shape::Lfm2)?;
    let ours = Ours::start(bench, &[Model::llm("model", path, Weights::Default)], 1).await?;
    let (mut computed, mut all) = (Vec::new(), Vec::new());
    for run in bench.runs("prefix") {
        let counted = count(&ours, run).await?;
        computed.push(counted.0);
        all.push(counted.1);
    }
    ours.stop().await;
    Ok(vec![Figure {
        what: "8 requests below a system prompt of 500 tokens, prompt tokens computed".to_owned(),
        unit: "tokens",
        ours: median(&computed),
        against: "all prompt tokens".to_owned(),
        theirs: median(&all),
        bar: Bar::RatioAtMost(0.2),
    }])
}

/// The prompt tokens of the requests that were computed, and all of them; below a system prompt that was never seen.
async fn count(ours: &Ours, run: u64) -> Result<(f64, f64)> {
    let system = Message::system(prompt::words(SYSTEM, run));
    let (mut computed, mut all) = (0, 0);
    for request in 0..REQUESTS {
        let question = Message::user(prompt::words(QUESTION, request));
        let messages = GenerateRequest::chat(vec![system.clone(), question]);
        let (_, answer) = ours.ask("model", messages, 4).await?;
        let tokens = answer.prompt_tokens.ok_or("the answer does not count its prompt")?;
        all += tokens;
        computed += tokens.saturating_sub(answer.cached_tokens.unwrap_or(0));
    }
    Ok((f64::from(computed), f64::from(all)))
}

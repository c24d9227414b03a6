//! A request that is dropped while its prompt is read, and what it costs to read prompts in chunks for that.

use std::time::{Duration, Instant};

use sarai::GenerateRequest;
use sarai_support::gguf::Shape;

use super::single;
use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::statistics::median;
use crate::{Result, prompt};

const MODEL: &str = "solar";
const PROMPT: usize = 1000;
const CANCEL_AFTER: Duration = Duration::from_secs(3);
const WEIGHTS: Weights = Weights::Repack;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let path = bench.shapes.file(Shape::Solar)?;
    let ours = Ours::start(bench, &[Model::llm(MODEL, path.clone(), WEIGHTS)], 1).await?;
    ours.sarai.pool().load(MODEL).await?;
    first_text(&ours, 0).await?;
    let (mut idle, mut after) = (Vec::new(), Vec::new());
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for run in bench.runs("cancel") {
        idle.push(first_text(&ours, 3 * run + 1).await?);
        let long = ours.begin(MODEL, GenerateRequest::raw(prompt::words(PROMPT, 3 * run + 2)), 1);
        if tokio::time::timeout(CANCEL_AFTER, long).await.is_ok() {
            return Err("the prompt was read before it could be cancelled".into());
        }
        after.push(first_text(&ours, 3 * run + 3).await?);

        own.push(single::prompt_speed(&ours, MODEL, run + 1000).await?);
        let speeds = bench.peer.speeds(&path, WEIGHTS, bench.threads, single::PROMPT, 1)?;
        peer.push(speeds.prompt);
    }
    ours.stop().await;
    let idle = median(&idle);
    Ok(vec![
        Figure {
            what: "cancel in a prompt of 1,000 tokens on SOLAR, to the start of the next request".to_owned(),
            unit: "s",
            ours: (median(&after) - idle).max(0.0),
            against: "the next request itself, to its first token".to_owned(),
            theirs: idle,
            bar: Bar::ValueAtMost(1.5),
        },
        Figure {
            what: format!("{} prompt in chunks, {}", Shape::Solar.name(), WEIGHTS.name()),
            unit: "tokens/s",
            ours: median(&own),
            against: format!("llama-bench {}, not in chunks", WEIGHTS.bench_flags().join(" ")),
            theirs: median(&peer),
            bar: Bar::RatioAtLeast(0.95),
        },
    ])
}

/// Seconds from a short request to its first text.
async fn first_text(ours: &Ours, seed: u64) -> Result<f64> {
    let started = Instant::now();
    drop(ours.begin(MODEL, GenerateRequest::raw(prompt::words(2, seed)), 1).await?);
    Ok(started.elapsed().as_secs_f64())
}

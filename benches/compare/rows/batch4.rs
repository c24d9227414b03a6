//! Four requests at once on one model.

use std::time::Instant;

use futures::future::try_join_all;
use sarai::GenerateRequest;
use sarai_support::gguf::Shape;

use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::statistics::median;
use crate::{Result, prompt};

const REQUESTS: u64 = 4;
const PROMPT: usize = 16;
const ANSWER: u32 = 128;
const WEIGHTS: Weights = Weights::Repack;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let path = bench.shapes.file(Shape::Lfm2)?;
    let ours = Ours::start(bench, &[Model::llm("model", path.clone(), WEIGHTS)], 1).await?;
    ours.sarai.pool().load("model").await?;
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    let (threads, n_ctx) = (bench.threads.to_string(), (REQUESTS * 1024).to_string());
    let flags = ["--parallel", "4", "--ctx-size", &n_ctx, "--threads", &threads];
    let server = bench.peer.serve(&path, WEIGHTS, &flags).await?;
    for run in bench.runs("batch4") {
        let prompts: Vec<String> =
            (0..REQUESTS).map(|request| prompt::words(PROMPT, run * REQUESTS + request)).collect();
        let started = Instant::now();
        let ask = |prompt: &String| {
            let request = GenerateRequest::raw(prompt.clone());
            async { Ok::<_, Box<dyn std::error::Error>>(ours.ask("model", request, ANSWER).await?.1) }
        };
        let answers = try_join_all(prompts.iter().map(ask)).await?;
        let tokens: u32 = answers.iter().filter_map(|answer| answer.completion_tokens).sum();
        own.push(f64::from(tokens) / started.elapsed().as_secs_f64());

        let started = Instant::now();
        let tokens = try_join_all(prompts.iter().map(|prompt| server.complete(prompt, ANSWER))).await?;
        peer.push(tokens.into_iter().sum::<u64>() as f64 / started.elapsed().as_secs_f64());
    }
    ours.stop().await;
    Ok(vec![Figure {
        what: format!("{} 4 requests, {}", Shape::Lfm2.name(), WEIGHTS.name()),
        unit: "tokens/s",
        ours: median(&own),
        against: format!("llama-server -np 4 {}", WEIGHTS.server_flags().join(" ")),
        theirs: median(&peer),
        bar: Bar::RatioAtLeast(1.0),
    }])
}

//! Embeddings beside language models at work.

use std::pin::pin;
use std::time::Instant;

use futures::StreamExt;
use futures::future::try_join_all;
use sarai::{AnswerStream, CallOptions, GenerateRequest};
use sarai_support::gguf::Shape;

use super::trio;
use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::statistics::p99;
use crate::{Result, prompt};

const TEXT: usize = 32;
const SAMPLES: u64 = 200;
const PROMPT: usize = 1000;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let mut models = trio::models(bench)?;
    models.push(Model {
        name: "embedding",
        path: bench.shapes.file(Shape::EmbeddingGemma)?,
        role: "embedding",
        weights: Weights::Default,
        n_ctx: 512,
    });
    let ours = Ours::start(bench, &models, trio::MODELS.len()).await?;
    let names = trio::MODELS.map(|(name, _)| name);
    for name in names {
        ours.sarai.pool().load(name).await?;
    }
    latencies(&ours, SAMPLES / 10).await?;
    let idle = p99(&latencies(&ours, SAMPLES).await?);

    // Returns with the first text: until then only the prompt is read.
    let reading = ours.begin("solar", GenerateRequest::raw(prompt::words(PROMPT, 0)), 1);
    let prompt = p99(&latencies_until(&ours, reading).await?);

    let begin = |name| ours.begin(name, GenerateRequest::raw(prompt::words(8, 0)), 3500);
    let mut streams = try_join_all(names.map(begin)).await?;
    let answers = try_join_all(streams.iter_mut().map(drain));
    let decoding = tokio::select! {
        _ = answers => return Err("an answer ended before the embeddings did".into()),
        samples = latencies(&ours, SAMPLES) => p99(&samples?),
    };
    drop(streams);
    ours.stop().await;

    let figure = |what: &str, busy| Figure {
        what: format!("embedding p99 while {what}"),
        unit: "ms",
        ours: busy,
        against: "p99 on an idle machine".to_owned(),
        theirs: idle,
        bar: Bar::RatioAtMost(3.0),
    };
    Ok(vec![
        figure("SOLAR reads a prompt of 1,000 tokens", prompt),
        figure("SOLAR, LFM2 and 1B decode", decoding),
    ])
}

/// Milliseconds that each of `n` texts took, one after another.
async fn latencies(ours: &Ours, n: u64) -> Result<Vec<f64>> {
    let mut latencies = Vec::new();
    for seed in 0..n {
        latencies.push(latency(ours, seed).await?);
    }
    Ok(latencies)
}

/// The same for as long as something else takes.
async fn latencies_until<T>(ours: &Ours, other: impl Future<Output = Result<T>>) -> Result<Vec<f64>> {
    let mut other = pin!(other);
    let mut latencies = Vec::new();
    for seed in 0.. {
        tokio::select! {
            ended = &mut other => {
                ended?;
                break;
            }
            latency = latency(ours, seed) => latencies.push(latency?),
        }
    }
    Ok(latencies)
}

async fn latency(ours: &Ours, seed: u64) -> Result<f64> {
    let embedding = ours.sarai.pool().handle("embedding")?;
    let started = Instant::now();
    embedding.embed(vec![prompt::words(TEXT, seed)], CallOptions::default()).await?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

/// Reads an answer, as a slow reader would hold the model up.
async fn drain(answer: &mut AnswerStream) -> Result<()> {
    while let Some(event) = answer.next().await {
        event?;
    }
    Ok(())
}

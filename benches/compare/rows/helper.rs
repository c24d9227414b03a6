//! Embeddings beside language models at work.

use std::cell::Cell;
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
use crate::statistics::{median, p99};
use crate::{Result, prompt};

const TEXT: usize = 32;
const SAMPLES: u64 = 200;
const PROMPT: usize = 1000;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let ours = start(bench).await?;
    let (mut idle, mut reading, mut decoding) = (Vec::new(), Vec::new(), Vec::new());
    for run in bench.runs("helper") {
        idle.push(p99(&latencies(&ours, SAMPLES).await?));

        // Returns with the first text: until then only the prompt is read.
        let prompt = ours.begin("solar", GenerateRequest::raw(prompt::words(PROMPT, run)), 1);
        reading.push(p99(&latencies_until(&ours, prompt).await?));

        decoding.push(p99(&beside_decoding(&ours, run).await?.latencies));
    }
    ours.stop().await;

    let idle = median(&idle);
    let figure = |what: &str, busy: &[f64]| Figure {
        what: format!("embedding p99 while {what}"),
        unit: "ms",
        ours: median(busy),
        against: "p99 on an idle machine".to_owned(),
        theirs: idle,
        bar: Bar::RatioAtMost(3.0),
    };
    Ok(vec![
        figure("SOLAR reads a prompt of 1,000 tokens", &reading),
        figure("SOLAR, LFM2 and 1B decode", &decoding),
    ])
}

/// Three language models and the helper, loaded and warm.
pub(super) async fn start(bench: &Bench) -> Result<Ours> {
    let mut models = trio::models(bench)?;
    models.push(Model {
        name: "embedding",
        path: bench.shapes.file(Shape::EmbeddingGemma)?,
        role: "embedding",
        weights: Weights::Default,
        n_ctx: 512,
    });
    let ours = Ours::start(bench, &models, trio::MODELS.len()).await?;
    for (name, _) in trio::MODELS {
        ours.sarai.pool().load(name).await?;
    }
    latencies(&ours, SAMPLES / 10).await?;
    Ok(ours)
}

/// What came while all decoded and texts were embedded.
pub(super) struct Beside {
    pub(super) latencies: Vec<f64>,
    /// Of the language models together.
    pub(super) tokens_per_second: f64,
}

pub(super) async fn beside_decoding(ours: &Ours, seed: u64) -> Result<Beside> {
    let begin = |name| ours.begin(name, GenerateRequest::raw(prompt::words(8, seed)), 3500);
    let mut streams = try_join_all(trio::MODELS.map(|(name, _)| begin(name))).await?;
    let tokens = Cell::new(0_u32);
    let answers = try_join_all(streams.iter_mut().map(|stream| drain(stream, &tokens)));
    let started = Instant::now();
    tokio::select! {
        ended = answers => {
            ended?;
            Err("an answer ended before the embeddings did".into())
        }
        latencies = latencies(ours, SAMPLES) => {
            let tokens_per_second = f64::from(tokens.get()) / started.elapsed().as_secs_f64();
            Ok(Beside { latencies: latencies?, tokens_per_second })
        }
    }
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

/// Reads an answer, as a slow reader would hold the model up, and counts its texts: a token each.
async fn drain(answer: &mut AnswerStream, tokens: &Cell<u32>) -> Result<()> {
    while let Some(event) = answer.next().await {
        event?;
        tokens.set(tokens.get() + 1);
    }
    Ok(())
}

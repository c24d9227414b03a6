//! One request at a time, weights held the same way on both sides, each run in an empty context. What a context full of earlier
//! conversations costs is shown besides.

use sarai::GenerateRequest;
use sarai_support::gguf::Shape;

use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::{Speeds, Weights};
use crate::report::{Bar, Figure};
use crate::statistics::median;
use crate::{Result, prompt};

pub(super) const PROMPT: usize = 512;
const ANSWER: u32 = 128;
const MODEL: &str = "model";
/// Earlier conversations that are kept in a full context, of the length of [`PROMPT`] each.
const KEPT: u64 = 6;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let mut shapes = vec![Shape::Lfm2, Shape::Llama1b];
    if bench.solar {
        shapes.push(Shape::Solar);
    }
    let mut figures = Vec::new();
    for shape in shapes {
        for weights in [Weights::Mmap, Weights::Repack] {
            figures.extend(of_shape(bench, shape, weights).await?);
        }
    }
    Ok(figures)
}

async fn of_shape(bench: &Bench, shape: Shape, weights: Weights) -> Result<Vec<Figure>> {
    let path = bench.shapes.file(shape)?;
    let ours = Ours::start(bench, &[Model::llm(MODEL, path.clone(), weights)], 1).await?;
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for run in bench.runs(&format!("{}, {}", shape.name(), weights.name())) {
        begin_anew(&ours, 1_000_000 + run).await?;
        own.push(speeds(&ours, run + 1).await?);
        peer.push(bench.peer.speeds(&path, weights, bench.threads, PROMPT, ANSWER)?);
    }
    let figure = |what: &str, speed: fn(&Speeds) -> f64| Figure {
        what: format!("{} {what}, {}", shape.name(), weights.name()),
        unit: "tokens/s",
        ours: median(&own.iter().map(speed).collect::<Vec<_>>()),
        against: format!("llama-bench {}", weights.bench_flags().join(" ")),
        theirs: median(&peer.iter().map(speed).collect::<Vec<_>>()),
        bar: Bar::RatioAtLeast(0.98),
    };
    let mut figures =
        vec![figure("decode", |speeds| speeds.decode), figure("prompt", |speeds| speeds.prompt)];
    if shape != Shape::Solar {
        let (mut empty, mut full) = (Vec::new(), Vec::new());
        for run in bench.runs(&format!("{}, {}, empty and full", shape.name(), weights.name())) {
            begin_anew(&ours, 2_000_000 + run).await?;
            empty.push(decode_speed(&ours, run).await?);
            for kept in 0..KEPT {
                prompt_speed(&ours, MODEL, 1000 * (run + 1) + kept).await?;
            }
            full.push(decode_speed(&ours, run).await?);
        }
        figures.push(Figure {
            what: format!("{} decode, {}, {KEPT} conversations kept", shape.name(), weights.name()),
            unit: "tokens/s",
            ours: median(&full),
            against: "none kept".to_owned(),
            theirs: median(&empty),
            bar: Bar::RatioAtLeast(0.9),
        });
    }
    ours.stop().await;
    Ok(figures)
}

/// Loads the model with an empty context, and warms it up, as llama-bench does, with a prompt that no session on disk has.
async fn begin_anew(ours: &Ours, seed: u64) -> Result<()> {
    ours.sarai.pool().unload(MODEL).await?;
    ours.sarai.pool().load(MODEL).await?;
    ours.ask(MODEL, GenerateRequest::raw(prompt::words(64, seed)), 8).await?;
    Ok(())
}

/// The speeds as the answers give them.
async fn speeds(ours: &Ours, seed: u64) -> Result<Speeds> {
    Ok(Speeds { decode: decode_speed(ours, seed).await?, prompt: prompt_speed(ours, MODEL, seed).await? })
}

/// Tokens per second after the first one, behind a prompt of two words.
async fn decode_speed(ours: &Ours, seed: u64) -> Result<f64> {
    let (_, answer) = ours.ask(MODEL, GenerateRequest::raw(prompt::words(2, seed)), ANSWER).await?;
    Ok(answer.tokens_per_second.ok_or("the answer does not say how fast it was")?)
}

/// Prompt tokens per second until the first token of the answer.
pub(super) async fn prompt_speed(ours: &Ours, model: &str, seed: u64) -> Result<f64> {
    let (_, answer) = ours.ask(model, GenerateRequest::raw(prompt::words(PROMPT, seed)), 1).await?;
    match (answer.prompt_tokens, answer.ttft_ms) {
        (Some(tokens), Some(ttft_ms)) => Ok(f64::from(tokens) * 1e3 / ttft_ms as f64),
        _ => Err("the answer does not say how long its prompt took".into()),
    }
}

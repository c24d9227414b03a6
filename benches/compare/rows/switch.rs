//! From one model to another, files in the page cache.

use std::path::Path;
use std::time::Instant;

use sarai::GenerateRequest;
use sarai_support::gguf::Shape;

use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::statistics::median;
use crate::{Result, prompt};

/// Tokens of the prompt: one, which shows the switch alone, and some to compute.
const PROMPTS: [usize; 2] = [1, 8];

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let solar = bench.shapes.file(Shape::Solar)?;
    let lfm2 = bench.shapes.file(Shape::Lfm2)?;
    let models =
        [Model::llm("solar", solar.clone(), Weights::Default), Model::llm("lfm2", lfm2, Weights::Default)];
    // One LLM at a time: the second evicts the first.
    let ours = Ours::start(bench, &models, 1).await?;
    let mut figures = Vec::new();
    for tokens in PROMPTS {
        figures.push(switch(bench, &ours, &solar, tokens).await?);
    }
    ours.stop().await;
    Ok(figures)
}

async fn switch(bench: &Bench, ours: &Ours, solar: &Path, tokens: usize) -> Result<Figure> {
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for run in bench.runs("switch") {
        let prompt = prompt::words(tokens, run);
        ours.ask("lfm2", GenerateRequest::raw(prompt.clone()), 1).await?;
        let started = Instant::now();
        drop(ours.begin("solar", GenerateRequest::raw(prompt.clone()), 1).await?);
        own.push(started.elapsed().as_secs_f64());

        // Gives SOLAR's memory back, so that the server has it.
        ours.ask("lfm2", GenerateRequest::raw(prompt.clone()), 1).await?;
        let started = Instant::now();
        let server = bench.peer.serve(solar, Weights::Default, &[]).await?;
        server.complete(&prompt, 1).await?;
        peer.push(started.elapsed().as_secs_f64());
    }
    Ok(Figure {
        what: format!("evict LFM2, load SOLAR, first token after {tokens} of prompt; auto"),
        unit: "s",
        ours: median(&own),
        against: "llama-server, default start to first token".to_owned(),
        theirs: median(&peer),
        bar: Bar::RatioAtMost(0.15),
    })
}

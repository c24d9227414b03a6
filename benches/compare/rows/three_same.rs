//! Three models of one shape at once, each from a file of its own.

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

const NAMES: [&str; 3] = ["one", "two", "three"];
const ANSWER: u32 = 64;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let mut models = Vec::new();
    for (number, name) in (1..).zip(NAMES) {
        models.push(Model::llm(name, bench.shapes.copy(Shape::Lfm2, number)?, Weights::Repack));
    }
    let ours = Ours::start(bench, &models, NAMES.len()).await?;
    let mut servers = Vec::new();
    for model in &models {
        ours.sarai.pool().load(model.name).await?;
        servers.push(bench.peer.serve(&model.path, Weights::Default, &["--ctx-size", "4096"]).await?);
    }
    let (mut own, mut peer) = (Vec::new(), Vec::new());
    for run in bench.runs("three_same") {
        let prompt = prompt::words(8, run);
        let started = Instant::now();
        let ask = |name| ours.ask(name, GenerateRequest::raw(prompt.clone()), ANSWER);
        let answers = try_join_all(NAMES.map(ask)).await?;
        let tokens: u32 = answers.iter().filter_map(|(_, answer)| answer.completion_tokens).sum();
        own.push(f64::from(tokens) / started.elapsed().as_secs_f64());

        let started = Instant::now();
        let tokens = try_join_all(servers.iter().map(|server| server.complete(&prompt, ANSWER))).await?;
        peer.push(tokens.into_iter().sum::<u64>() as f64 / started.elapsed().as_secs_f64());
    }
    ours.stop().await;
    Ok(vec![Figure {
        what: format!("three {}, one request each, repack", Shape::Lfm2.name()),
        unit: "tokens/s",
        ours: median(&own),
        against: "three llama-servers, default threads".to_owned(),
        theirs: median(&peer),
        bar: Bar::RatioAtLeast(3.0),
    }])
}

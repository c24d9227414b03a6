//! Pipelines and the router with scripted models and a paused clock.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod compile;
mod media;
mod route;
mod run;
mod streaming;
mod utterances;

use std::path::Path;
use std::sync::Arc;

use sarai_core::config::{ConfigError, Env, Overrides, PipelineConfig, Resolved};
use sarai_core::pipeline::Pipeline;
use sarai_core::tone::Tones;

/// The steps under `pipelines.p.steps`, with models a, b and c, an embedding model and a router.
fn parse(steps: &str) -> Result<Resolved, ConfigError> {
    let steps: String = steps.lines().map(|line| format!("      {line}\n")).collect();
    let text = format!(
        "models:\n  a: {{backend: gguf_native}}\n  b: {{backend: gguf_native}}\n  c: {{backend: gguf_native}}\n  \
         e: {{role: embedding, backend: gguf_native}}\n  \
         r: {{role: router, kind: similarity, model: e, labels: {{hard: [theorem], soft: [hello]}}, routes: {{hard: a, soft: b}}}}\n\
         pipelines:\n  p:\n    steps:\n{steps}"
    );
    sarai_core::config::parse(&text, Some(Path::new("p.yaml")), &Env::default(), &Overrides::default())
}

fn config(steps: &str) -> (PipelineConfig, sarai_core::config::RouterConfig) {
    let config = parse(steps).unwrap().config;
    (config.pipelines.into_values().next().unwrap(), config.router.unwrap())
}

fn pipeline(steps: &str) -> Arc<Pipeline> {
    Arc::new(Pipeline::compile("p".parse().unwrap(), &config(steps).0, &Tones::default()).unwrap())
}

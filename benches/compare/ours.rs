//! sarai's side: a pool over the given files, through the facade.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use futures::{FutureExt, StreamExt};
use sarai::{Answer, AnswerEvent, AnswerStream, CallOptions, GenerateRequest, Sampling, Sarai};
use serde_json::{Map, Value, json};

use crate::args::Bench;
use crate::machine::ram_gb;
use crate::peer::Weights;
use crate::{Result, prompt};

/// A model of the pool.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) role: &'static str,
    pub(crate) weights: Weights,
    pub(crate) n_ctx: u32,
}

impl Model {
    pub(crate) fn llm(name: &'static str, path: PathBuf, weights: Weights) -> Self {
        Self { name, path, role: "llm", weights, n_ctx: 4096 }
    }
}

/// A running pool.
#[derive(Debug)]
pub(crate) struct Ours {
    pub(crate) sarai: Sarai,
    /// Its configuration and what it keeps of conversations.
    _folder: tempfile::TempDir,
}

impl Ours {
    /// A pool that keeps at most so many LLMs; nothing but residents is loaded yet.
    pub(crate) async fn start(bench: &Bench, models: &[Model], most_llms: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let models: Map<String, Value> =
            models.iter().map(|model| (model.name.to_owned(), configured(model, bench.threads))).collect();
        let config = json!({
            "models": models,
            "memory": {"max_ram_gb": ram_gb(), "max_concurrent_llms": most_llms},
            "queue": {"wait_timeout": "1h"},
            "sessions": {"path": folder.path().join("sessions")},
        });
        // JSON is YAML.
        let file = folder.path().join("sarai.yaml");
        std::fs::write(&file, config.to_string())?;
        Ok(Self { sarai: Sarai::from_file(file).await?, _folder: folder })
    }

    /// Starts an answer of up to `tokens` tokens, always the likeliest one; returns with its first text.
    pub(crate) async fn begin(
        &self,
        model: &str,
        request: GenerateRequest,
        tokens: u32,
    ) -> Result<AnswerStream> {
        let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(tokens), ..Sampling::default() };
        let handle = self.sarai.pool().handle(model)?;
        Ok(handle.generate(request.with_sampling(sampling), CallOptions::default()).await?)
    }

    /// The whole answer: its text and its end.
    pub(crate) async fn ask(
        &self,
        model: &str,
        request: GenerateRequest,
        tokens: u32,
    ) -> Result<(String, Answer)> {
        let mut stream = self.begin(model, request, tokens).await?;
        let mut said = String::new();
        while let Some(event) = stream.next().await {
            match event? {
                AnswerEvent::Text(text) => said.push_str(&text),
                AnswerEvent::Done(answer) => return Ok((said, answer)),
            }
        }
        Err("the answer has no end".into())
    }

    /// Tokens per second of each model while all of them decode, over a window in which nothing else happens.
    pub(crate) async fn decode_rates(&self, models: &[&str], window: Duration) -> Result<Vec<f64>> {
        let begin = |model| self.begin(model, GenerateRequest::raw(prompt::words(8, 0)), 3500);
        let mut streams = try_join_all(models.iter().map(|model| begin(model))).await?;
        // What came while the others were still starting is no part of the window.
        for stream in &mut streams {
            while let Some(Some(event)) = stream.next().now_or_never() {
                event?;
            }
        }
        let end = Instant::now() + window;
        try_join_all(streams.iter_mut().map(|stream| rate(stream, end))).await
    }

    pub(crate) async fn stop(self) {
        self.sarai.pool().shutdown(Duration::ZERO).await;
    }
}

fn configured(model: &Model, threads: usize) -> Value {
    json!({
        "role": model.role,
        "backend": "gguf_native",
        "path": model.path,
        "context": model.n_ctx,
        "weights": model.weights.name(),
        "threads": threads,
    })
}

/// Texts per second from the first that comes until the last before `end`. Each token of a shape is a word, and each
/// word comes alone.
async fn rate(stream: &mut AnswerStream, end: Instant) -> Result<f64> {
    let mut came = Vec::new();
    while let Ok(event) = tokio::time::timeout_at(end.into(), stream.next()).await {
        match event {
            Some(Ok(AnswerEvent::Text(_))) => came.push(Instant::now()),
            Some(Ok(AnswerEvent::Done(_))) | None => return Err("an answer ended within the window".into()),
            Some(Err(error)) => return Err(error.into()),
        }
    }
    match (came.as_slice(), came.len()) {
        ([first, .., last], n) => Ok((n - 1) as f64 / last.duration_since(*first).as_secs_f64()),
        _ => Err("the window is too short for two tokens".into()),
    }
}

//! What the pool costs a request on a model that is ready.

use std::sync::Arc;
use std::time::Instant;

use sarai::core::backend::ServedBy;
use sarai::core::testing::{FakeBackend, FakeProbe};
use sarai::{Bytes, Limits, ModelHandle, ModelPool, ModelSpec, PlaceSpec};
use tokio::sync::{mpsc, oneshot};

use crate::Result;
use crate::args::Bench;
use crate::report::{Bar, Figure};
use crate::statistics::median;

const TURNS: usize = 20_000;
const MODEL: Bytes = Bytes(1_000_000_000);

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let handle = ready().await?;
    let (mut leases, mut messages) = (Vec::new(), Vec::new());
    for _ in bench.runs("lease") {
        let handle = handle.clone();
        // Tasks of the runtime, as a caller's code is.
        leases.push(tokio::spawn(async move { lease_and_release(&handle).await }).await??);
        messages.push(tokio::spawn(message_and_answer()).await??);
    }
    Ok(vec![Figure {
        what: "lease and release of a model that is ready".to_owned(),
        unit: "µs",
        ours: median(&leases),
        against: "a message to a task and its answer".to_owned(),
        theirs: median(&messages),
        bar: Bar::ValueAtMost(10.0),
    }])
}

/// A handle to a model that is loaded.
async fn ready() -> Result<ModelHandle> {
    let backend = FakeBackend::new(ServedBy::GgufNative("model.gguf".into()), MODEL);
    let spec = ModelSpec::new("model".parse()?, vec![PlaceSpec::Backend(Arc::new(backend))]);
    let limits = Limits { budget: MODEL, ..Limits::default() };
    let probe = Arc::new(FakeProbe::new(Bytes(MODEL.0 * 8)));
    let pool = ModelPool::builder(limits).probe(probe).model(spec).build()?;
    Ok(pool.get("model").await?)
}

/// The median of many turns in microseconds. The model serves one request at a time, so that each lease waits for the
/// release before it.
async fn lease_and_release(handle: &ModelHandle) -> std::result::Result<f64, sarai::Error> {
    let mut turns = Vec::with_capacity(TURNS);
    for _ in 0..TURNS {
        let started = Instant::now();
        drop(handle.lease().await?);
        turns.push(started.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(&turns))
}

async fn message_and_answer() -> std::result::Result<f64, oneshot::error::RecvError> {
    let (sender, mut messages) = mpsc::channel::<oneshot::Sender<()>>(16);
    tokio::spawn(async move {
        while let Some(answer) = messages.recv().await {
            // Whoever asked waits for it.
            let _gone = answer.send(());
        }
    });
    let mut turns = Vec::with_capacity(TURNS);
    for _ in 0..TURNS {
        let started = Instant::now();
        let (answer, answered) = oneshot::channel();
        // Where the task is gone, so is the answer.
        let _gone = sender.send(answer).await;
        answered.await?;
        turns.push(started.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(&turns))
}

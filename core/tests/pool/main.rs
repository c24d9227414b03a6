//! The pool with scripted backends and a paused clock: a file per hazard.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod cancel;
mod continued;
mod fallback;
mod heard;
mod lifetime;
mod memory;
mod residency;
mod sharing;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sarai_core::Error;
use sarai_core::answer::{Answer, AnswerEvent, AnswerStream, CallOptions};
use sarai_core::pool::{ModelPool, ModelSpec, PlaceSpec};
use sarai_core::request::{GenerateRequest, Message};
use sarai_core::scheduler::{Eviction, Limits, Phase};
use sarai_core::testing::{FakeBackend, FakeProbe};
use sarai_core::units::Bytes;

fn limits(budget: u64, max_concurrent_llms: usize) -> Limits {
    Limits {
        budget: Bytes(budget),
        spare: Bytes::ZERO,
        reserve: Bytes::ZERO,
        eviction: Eviction::Lru,
        max_concurrent_llms,
        max_waiting: 16,
        aging: Duration::from_secs(30),
        drain_after: Duration::from_secs(5),
    }
}

/// A model that can run at each of `places`, first choice first.
fn model(name: &str, places: &[&FakeBackend]) -> ModelSpec {
    let places = places.iter().map(|&backend| PlaceSpec::Backend(Arc::new(backend.clone())));
    ModelSpec::new(name.parse().unwrap(), places.collect())
}

fn pool(limits: Limits, models: impl IntoIterator<Item = ModelSpec>) -> ModelPool {
    let builder = ModelPool::builder(limits).probe(Arc::new(FakeProbe::new(Bytes::from_gb(16.0))));
    models.into_iter().fold(builder, |builder, model| builder.model(model)).build().unwrap()
}

async fn ask(pool: &ModelPool, model: &str) -> Result<AnswerStream, Error> {
    let request = GenerateRequest::chat(vec![Message::user("hello")]);
    pool.handle(model)?.generate(request, CallOptions::default()).await
}

/// Reads an answer to its end.
async fn read(mut stream: AnswerStream) -> (String, Result<Answer, Error>) {
    let mut text = String::new();
    loop {
        match stream.next().await.expect("a stream ends with Done or an error") {
            Ok(AnswerEvent::Text(piece)) => text += &piece,
            Ok(AnswerEvent::Done(answer)) => return (text, Ok(answer)),
            Err(error) => return (text, Err(error)),
        }
    }
}

/// What the pool says of a model's first place. The driver answers in turn, so everything sent before is done.
async fn phase(pool: &ModelPool, model: &str) -> (Phase, usize) {
    let status = pool.status().await.unwrap();
    let slot = status.slots.iter().find(|slot| slot.model.as_str() == model).unwrap();
    (slot.phase, slot.leases)
}

/// Lets the other tasks run until `done` holds. Some of them are on other threads, whose time is the real one.
async fn until(mut done: impl AsyncFnMut() -> bool) {
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(30) {
        if done().await {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("it did not come to pass");
}

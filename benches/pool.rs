//! What the pool costs a request on a model that is ready: a lease through the driver task, and its release.
//!
//! Held to 10 µs in the median, on one thread as on several. `cargo bench --bench pool`

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on should panic")]

use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, criterion_group, criterion_main};
use sarai_core::backend::ServedBy;
use sarai_core::pool::{ModelHandle, ModelPool, ModelSpec, PlaceSpec};
use sarai_core::scheduler::Limits;
use sarai_core::testing::{FakeBackend, FakeProbe};
use sarai_core::units::Bytes;
use tokio::runtime::{Builder, Runtime};

const MODEL: Bytes = Bytes(1_000_000_000);

/// A handle to a model that is loaded.
async fn ready() -> ModelHandle {
    let backend = FakeBackend::new(ServedBy::GgufNative("model.gguf".into()), MODEL);
    let spec = ModelSpec::new("model".parse().unwrap(), vec![PlaceSpec::Backend(Arc::new(backend))]);
    let limits = Limits { budget: MODEL, ..Limits::default() };
    let probe = Arc::new(FakeProbe::new(Bytes(MODEL.0 * 8)));
    let pool = ModelPool::builder(limits).probe(probe).model(spec).build().unwrap();
    pool.get("model").await.unwrap()
}

/// The model serves one request at a time, so that a lease waits for the release before it: each turn has both.
fn lease_and_release(criterion: &mut Criterion, name: &str, runtime: &Runtime) {
    let handle = runtime.block_on(ready());
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|turns| {
            let handle = handle.clone();
            // A task of the runtime, as a caller's code is.
            let task = runtime.spawn(async move {
                let started = Instant::now();
                for _ in 0..turns {
                    drop(handle.lease().await.unwrap());
                }
                started.elapsed()
            });
            runtime.block_on(task).unwrap()
        });
    });
}

fn pool(criterion: &mut Criterion) {
    let one = Builder::new_current_thread().enable_all().build().unwrap();
    lease_and_release(criterion, "lease and release, one thread", &one);
    let two = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    lease_and_release(criterion, "lease and release, two threads", &two);
}

criterion_group!(benches, pool);
criterion_main!(benches);

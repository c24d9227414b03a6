use std::time::Duration;

use futures::{FutureExt, StreamExt};
use sarai_core::Error;
use sarai_core::failure::FailureKind;
use sarai_core::pool::{Lease, ModelHandle, ModelPool};
use sarai_core::testing::FakeBackend;

use super::{ask, limits, model, pool, read, until};

static_assertions::assert_impl_all!(ModelPool: Send, Sync, Clone);
static_assertions::assert_impl_all!(ModelHandle: Send, Sync, Clone);
static_assertions::assert_impl_all!(Lease: Send, Sync);
static_assertions::assert_impl_all!(Error: Send, Sync, Clone);

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_running_requests_and_gives_all_memory_back() {
    let backend = FakeBackend::local("a", 100).says(&["one ", "two"]);
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    let stream = ask(&pool, "a").await.unwrap();
    let mut shutdown = Box::pin(pool.shutdown(Duration::from_secs(60)));
    assert!(shutdown.as_mut().now_or_never().is_none());
    until(async || matches!(ask(&pool, "a").await, Err(Error::ShuttingDown))).await;
    let (text, end) = read(stream).await;
    assert_eq!(text, "one two");
    end.unwrap();
    shutdown.await;
    assert_eq!(backend.loaded(), 0);
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_longer_than_its_grace() {
    let backend = FakeBackend::local("a", 100).hangs();
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    let mut stream = ask(&pool, "a").await.unwrap();
    stream.next().await.unwrap().unwrap();
    let before = tokio::time::Instant::now();
    pool.shutdown(Duration::from_secs(5)).await;
    assert_eq!(before.elapsed(), Duration::from_secs(5));
    assert_eq!(backend.loaded(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_pool_unloads_everything_by_itself() {
    let backend = FakeBackend::local("a", 100);
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    pool.load("a").await.unwrap();
    drop(pool);
    until(async || backend.loaded() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_panics_fails_its_load_and_the_pool_lives_on() {
    let (bad, good) = (FakeBackend::local("bad", 100).load_panics(), FakeBackend::local("good", 100));
    let pool = pool(limits(1000, 3), [model("bad", &[&bad]), model("good", &[&good])]);
    match pool.get("bad").await {
        Err(Error::Load { cause, .. }) => assert_eq!(cause.to_string(), "panicked: scripted panic"),
        other => panic!("{other:?}"),
    }
    assert_eq!(pool.status().await.unwrap().used.0, 0);
    pool.get("good").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_load_is_tried_again_after_its_pause_and_not_before() {
    let backend = FakeBackend::local("a", 100).load_fails(FailureKind::Engine);
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    assert!(matches!(pool.get("a").await, Err(Error::Load { .. })));
    assert!(matches!(pool.get("a").await, Err(Error::LoadBackoff { .. })));
    tokio::time::advance(Duration::from_secs(10)).await;
    assert!(matches!(pool.get("a").await, Err(Error::Load { .. })));
    assert_eq!(backend.loads(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_idle_model_goes_after_its_ttl() {
    let backend = FakeBackend::local("a", 100);
    let mut spec = model("a", &[&backend]);
    spec.ttl = Some(Duration::from_secs(45));
    let pool = pool(limits(1000, 3), [spec]);
    pool.load("a").await.unwrap();
    tokio::time::sleep(Duration::from_secs(44)).await;
    assert_eq!(backend.loaded(), 1);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(backend.loaded(), 0);
}

#[tokio::test]
async fn fallbacks_that_lead_back_to_themselves_are_refused_when_the_pool_is_built() {
    let backend = FakeBackend::local("a", 1);
    let mut a = model("a", &[&backend]);
    let mut b = model("b", &[&backend]);
    a.places.push(sarai_core::pool::PlaceSpec::Model("b".parse().unwrap()));
    b.places.push(sarai_core::pool::PlaceSpec::Model("a".parse().unwrap()));
    let error = ModelPool::builder(limits(10, 1)).model(a).model(b).build().unwrap_err();
    assert_eq!(error.to_string(), "models.a: its fallbacks lead back to itself");
}

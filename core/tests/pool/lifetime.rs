use std::time::Duration;

use futures::{FutureExt, StreamExt, TryStreamExt};
use sarai_core::Error;
use sarai_core::failure::FailureKind;
use sarai_core::pool::{Lease, ModelHandle, ModelPool};
use sarai_core::request::{Delta, GenerateRequest, Message};
use sarai_core::scheduler::Phase;
use sarai_core::testing::FakeBackend;

use super::{ask, limits, model, phase, pool, read, until};

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

#[tokio::test(start_paused = true)]
async fn an_answer_gives_its_place_free_at_its_end_even_if_nobody_drops_the_stream() {
    for backend in [FakeBackend::local("a", 100), FakeBackend::local("a", 100).fails(FailureKind::CutOff)] {
        let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
        let mut stream = ask(&pool, "a").await.unwrap();
        while stream.next().await.is_some() {}
        assert_eq!(phase(&pool, "a").await, (Phase::Ready, 0));
        assert_eq!(backend.streams(), 0);
        pool.shutdown(Duration::from_secs(60)).await;
        assert_eq!(backend.loaded(), 0);
        drop(stream);
    }
}

#[tokio::test(start_paused = true)]
async fn a_model_whose_engine_has_ended_is_unloaded_and_loaded_again() {
    let backend = FakeBackend::local("a", 100).says(&["half"]).fails(FailureKind::EngineGone);
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    let (text, end) = read(ask(&pool, "a").await.unwrap()).await;
    assert_eq!(text, "half");
    end.unwrap_err();
    until(async || backend.loaded() == 0).await;
    assert!(matches!(pool.get("a").await, Err(Error::LoadBackoff { .. })));
    tokio::time::advance(Duration::from_secs(10)).await;
    let lease = pool.handle("a").unwrap().lease().await.unwrap();
    assert_eq!(backend.loads(), 2);
    lease.embed(vec!["text".to_owned()]).await.unwrap_err();
    drop(lease);
    until(async || backend.loaded() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn requests_on_a_lease_run_on_its_place() {
    let backend = FakeBackend::local("a", 100).says(&["one ", "two"]);
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    let lease = pool.handle("a").unwrap().lease().await.unwrap();
    for _ in 0..2 {
        let request = GenerateRequest::chat(vec![Message::user("hello")]);
        let deltas: Vec<_> = lease.generate(request).await.unwrap().try_collect().await.unwrap();
        assert!(matches!(&deltas[..], [Delta::Text(one), Delta::Text(_), Delta::Done(_)] if one == "one "));
    }
    assert_eq!(lease.embed(vec!["text".to_owned()]).await.unwrap().vectors.len(), 1);
    assert!(matches!(lease.classify("text".to_owned()).await, Err(Error::Request { .. })));
    assert_eq!((backend.loads(), backend.requests()), (1, 3));
}

#[test]
fn without_a_runtime_a_pool_says_what_is_missing() {
    let backend = FakeBackend::local("a", 100);
    let built = ModelPool::builder(limits(1000, 3)).model(model("a", &[&backend])).build();
    assert!(matches!(built, Err(Error::NoRuntime)));
}

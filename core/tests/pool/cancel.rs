use std::time::Duration;

use futures::{FutureExt, StreamExt};
use sarai_core::answer::{CallOptions, Priority};
use sarai_core::request::GenerateRequest;
use sarai_core::scheduler::Phase;
use sarai_core::testing::FakeBackend;
use sarai_core::{Error, ErrorKind};

use super::{ask, limits, model, phase, pool, read, until};

#[tokio::test(start_paused = true)]
async fn a_caller_who_leaves_while_loading_stops_the_load() {
    let backend = FakeBackend::local("a", 100).loads_wait();
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    {
        let mut request = Box::pin(pool.get("a"));
        until(async || request.as_mut().now_or_never().is_none() && backend.loads() == 1).await;
    }
    until(async || backend.cancelled_loads() == 1).await;
    until(async || phase(&pool, "a").await.0 == Phase::Absent).await;
    assert_eq!(pool.status().await.unwrap().used.0, 0);
}

#[tokio::test(start_paused = true)]
async fn of_two_who_wait_for_one_load_the_second_is_served_when_the_first_leaves() {
    let backend = FakeBackend::local("a", 100).loads_wait();
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    let mut first = Box::pin(ask(&pool, "a"));
    let mut second = Box::pin(ask(&pool, "a"));
    until(async || {
        assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
        backend.loads() == 1
    })
    .await;
    drop(first);
    backend.finish_load();
    read(second.await.unwrap()).await.1.unwrap();
    assert_eq!((backend.loads(), backend.cancelled_loads()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn dropping_a_stream_stops_the_work_and_frees_the_place() {
    let backend = FakeBackend::local("a", 100).hangs();
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    let mut stream = ask(&pool, "a").await.unwrap();
    stream.next().await.unwrap().unwrap();
    assert_eq!((phase(&pool, "a").await.1, backend.streams()), (1, 1));
    drop(stream);
    assert_eq!(backend.streams(), 0);
    until(async || phase(&pool, "a").await.1 == 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_who_leaves_in_the_end_gives_its_place_free() {
    let backend = FakeBackend::local("a", 100).says(&["one ", "two ", "three"]).hangs();
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    let mut slow = ask(&pool, "a").await.unwrap();
    slow.next().await.unwrap().unwrap();
    let mut next = Box::pin(ask(&pool, "a"));
    for _ in 0..5 {
        assert!(next.as_mut().now_or_never().is_none(), "the place is taken for as long as it reads");
        tokio::time::sleep(Duration::from_secs(30)).await;
    }
    drop(slow);
    let mut next = next.await.unwrap();
    next.next().await.unwrap().unwrap();
    assert_eq!((backend.requests(), backend.streams(), phase(&pool, "a").await.1), (2, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_cancelled_requests_leave_nothing_behind() {
    let (a, b) = (FakeBackend::local("a", 100).hangs(), FakeBackend::local("b", 100));
    let pool = pool(limits(100, 3), [model("a", &[&a]), model("b", &[&b])]);
    for round in 0..10_000_u32 {
        let mut request = Box::pin(ask(&pool, if round % 3 == 0 { "b" } else { "a" }));
        // Dropped at every stage there is: before it is sent, queued, loading, waiting for an eviction, streaming.
        for _ in 0..round % 7 {
            if request.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    until(async || {
        let status = pool.status().await.unwrap();
        status.waiting == 0 && status.slots.iter().all(|slot| slot.leases == 0)
    })
    .await;
    assert_eq!((a.streams(), b.streams()), (0, 0));
    read(ask(&pool, "b").await.unwrap()).await.1.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_too_long_says_who_holds_the_memory() {
    let (a, b) = (FakeBackend::local("a", 100), FakeBackend::local("b", 100));
    let pool = pool(limits(100, 3), [model("a", &[&a]), model("b", &[&b])]);
    let _busy = pool.handle("a").unwrap().lease().await.unwrap();
    let options = CallOptions {
        priority: Priority::Interactive,
        wait_timeout: Some(Duration::from_secs(3)),
        ..CallOptions::default()
    };
    let request = GenerateRequest::raw("x");
    let error = pool.handle("b").unwrap().generate(request, options).await.err().expect("an error");
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(error.to_string(), "model b was not ready within 3.0 s (held by a 100 B)");
}

#[tokio::test(start_paused = true)]
async fn too_many_waiting_requests_are_refused_at_once() {
    let a = FakeBackend::local("a", 100).loads_wait();
    let pool = pool(limits(100, 3), [model("a", &[&a])]);
    let mut waiting: Vec<_> = (0..17).map(|_| Box::pin(pool.get("a"))).collect();
    for request in &mut waiting[..16] {
        assert!(request.as_mut().now_or_never().is_none());
    }
    let refused = waiting.pop().unwrap().await;
    assert!(matches!(refused, Err(Error::QueueFull { waiting: 16 })), "{refused:?}");
}

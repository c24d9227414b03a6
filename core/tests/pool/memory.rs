//! What models really hold, and a budget that changes.

use std::sync::Arc;
use std::time::Duration;

use sarai_core::config::{Budget, Class, Preset};
use sarai_core::memory::Probe;
use sarai_core::pool::{ModelPool, ModelSpec, Replay, TracedRequest};
use sarai_core::scheduler::{Eviction, Limits, Phase};
use sarai_core::testing::{FakeBackend, FakeProbe};
use sarai_core::units::Bytes;
use sarai_core::{Error, ErrorKind};

use super::heard::{Log, Numbers};
use super::{ask, limits, model, phase, pool, read, until};

async fn answers(pool: &ModelPool, name: &str) {
    read(ask(pool, name).await.unwrap()).await.1.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_unload_that_gives_too_little_back_is_said_with_its_numbers_and_counted() {
    let (log, _listening) = Log::listen();
    let numbers = Numbers::default();
    let (short, whole) = (
        FakeBackend::local("short", 100).gives_back(1_000_000_000, 900_000_000),
        FakeBackend::local("whole", 100).gives_back(1_000_000_000, 960_000_000),
    );
    let models = || [model("short", &[&short]), model("whole", &[&whole])];
    let pool = metrics::with_local_recorder(&numbers, || pool(limits(1000, 3), models()));
    for name in ["short", "whole"] {
        pool.load(name).await.unwrap();
        assert_eq!(pool.unload(name).await.unwrap(), Bytes(100), "the ledger is even in any case");
    }
    let warned = log.lines("did not give all memory back");
    assert_eq!(warned.len(), 1, "{warned:?}");
    for part in ["WARN", "model=short", "held=1.00 GB", "returned=900.0 MB", "missing=100.0 MB"] {
        assert!(warned[0].contains(part), "{part}: {warned:?}");
    }
    let counted = |name: &str| {
        numbers.counter(&format!("sarai_unload_shortfall_bytes_total {name} gguf_native:{name}"))
    };
    assert_eq!((counted("short"), counted("whole")), (100_000_000, 0));
}

#[tokio::test(start_paused = true)]
async fn a_model_whose_memory_cannot_be_looked_at_is_ready_all_the_same() {
    let (log, _listening) = Log::listen();
    let backend = FakeBackend::local("a", 100).measuring_panics();
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    answers(&pool, "a").await;
    let usage = pool.memory_usage().await.unwrap();
    assert_eq!((usage.used_bytes, usage.models[0].measured), (Bytes(100), None));
    assert!(!log.lines("could not be measured").is_empty());
    assert_eq!(pool.unload("a").await.unwrap(), Bytes(100));
}

#[tokio::test(start_paused = true)]
async fn what_steps_take_after_a_load_reaches_the_ledger_and_the_gauges() {
    let numbers = Numbers::default();
    let (a, b) = (FakeBackend::local("a", 100), FakeBackend::local("b", 100));
    let models = || [model("a", &[&a]), model("b", &[&b])];
    let pool = metrics::with_local_recorder(&numbers, || pool(limits(250, 3), models()));
    answers(&pool, "b").await;
    let lease = pool.handle("a").unwrap().lease().await.unwrap();
    a.takes(140);
    assert_eq!(pool.memory_usage().await.unwrap().used_bytes, Bytes(200));
    drop(lease);
    assert_eq!(pool.memory_usage().await.unwrap().used_bytes, Bytes(240));
    let gauge = |kind: &str| numbers.gauge(&format!("sarai_model_bytes a gguf_native:a {kind}"));
    assert_eq!(
        (gauge("reserved"), gauge("anonymous"), numbers.gauge("sarai_used_bytes")),
        (140.0, 140.0, 240.0)
    );
    // More than there is: the one that was not used for longer goes.
    a.takes(180);
    answers(&pool, "a").await;
    until(async || b.loaded() == 0).await;
    assert_eq!(numbers.gauge("sarai_used_bytes"), 180.0);
}

#[tokio::test(start_paused = true)]
async fn the_machine_is_looked_at_every_thirty_seconds_and_what_models_hold_with_it() {
    let (a, b) = (FakeBackend::local("a", 600), FakeBackend::local("b", 100));
    let probe = Arc::new(FakeProbe::new(Bytes(5000)));
    let builder = ModelPool::builder(limits(1000, 3)).model(model("a", &[&a])).model(model("b", &[&b]));
    let pool = builder.probe(Arc::clone(&probe) as Arc<dyn Probe>).build().unwrap();
    pool.load("a").await.unwrap();
    pool.load("b").await.unwrap();
    b.takes(150);
    tokio::time::sleep(Duration::from_secs(31)).await;
    until(async || pool.memory_usage().await.unwrap().used_bytes == Bytes(750)).await;
    probe.set_available(Bytes(800));
    tokio::time::sleep(Duration::from_secs(28)).await;
    assert_eq!((a.loaded(), b.loaded()), (1, 1), "nobody has looked yet");
    tokio::time::sleep(Duration::from_secs(3)).await;
    until(async || a.loaded() == 0).await;
    assert_eq!(b.loaded(), 1, "no more than is needed goes");
}

#[tokio::test(start_paused = true)]
async fn a_smaller_budget_lets_idle_models_go_running_requests_end_and_new_ones_wait() {
    let backends = ["a", "b", "c"].map(|name| FakeBackend::local(name, 100));
    let models = ["a", "b", "c"].iter().zip(&backends).map(|(name, backend)| model(name, &[backend]));
    let pool = pool(limits(300, 3), models);
    answers(&pool, "a").await;
    answers(&pool, "b").await;
    let running = pool.handle("c").unwrap().lease().await.unwrap();
    pool.set_budget(Bytes(120)).await.unwrap();
    until(async || backends.each_ref().map(FakeBackend::loaded) == [0, 0, 1]).await;
    let mut waiting = Box::pin(ask(&pool, "a"));
    assert!(futures::FutureExt::now_or_never(waiting.as_mut()).is_none());
    until(async || phase(&pool, "a").await.0 == Phase::Waiting).await;
    assert_eq!(phase(&pool, "c").await, (Phase::Ready, 1));
    drop(running);
    read(waiting.await.unwrap()).await.1.unwrap();
    assert_eq!(backends.each_ref().map(FakeBackend::loaded), [1, 0, 0]);
    pool.set_budget(Bytes(300)).await.unwrap();
    answers(&pool, "c").await;
    assert_eq!(backends.each_ref().map(FakeBackend::loaded), [1, 0, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_budget_is_a_number_or_a_preset_and_never_zero() {
    let pool = pool(limits(1000, 3), [model("a", &[&FakeBackend::local("a", 100)])]);
    let error = pool.set_budget(Bytes::ZERO).await.unwrap_err();
    assert!(matches!(error, Error::NoBudget) && error.kind() == ErrorKind::Usage);
    let budget = async || pool.status().await.unwrap().budget;
    assert_eq!(budget().await, Bytes(1000));
    // The machine has 16 GB, of which 1 GB is left alone.
    for (set, is) in [
        (Budget::from(Preset::Low), 2.0),
        (Preset::High.into(), 12.0),
        (Preset::VeryHigh.into(), 15.0),
        (Preset::Auto.into(), 12.0),
        (Budget::Auto, 12.0),
        (Bytes::from_gb(3.5).into(), 3.5),
    ] {
        pool.set_budget(set).await.unwrap();
        assert_eq!(budget().await, Bytes::from_gb(is), "{set:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_budget_below_what_pinned_models_hold_is_taken_with_a_warning() {
    let (log, _listening) = Log::listen();
    let (a, b) = (FakeBackend::local("a", 100), FakeBackend::local("b", 100));
    let pool = pool(limits(1000, 3), [model("a", &[&a]), model("b", &[&b])]);
    pool.pin("a").await.unwrap();
    answers(&pool, "a").await;
    answers(&pool, "b").await;
    pool.set_budget(Bytes(150)).await.unwrap();
    until(async || b.loaded() == 0).await;
    assert!(log.lines("pinned models hold more").is_empty());
    pool.set_budget(Bytes(60)).await.unwrap();
    assert_eq!(pool.status().await.unwrap().budget, Bytes(60));
    let warned = log.lines("pinned models hold more");
    assert!(
        warned.len() == 1 && warned[0].contains(r#"pinned=100 B budget=60 B models=["a"]"#),
        "{warned:?}"
    );
    assert!(matches!(ask(&pool, "b").await.err(), Some(Error::OverBudget { left: Bytes::ZERO, .. })));
    answers(&pool, "a").await;
    assert_eq!(a.loads(), 1, "it stays");
    // The same where a model is pinned that was not.
    pool.set_budget(Bytes(150)).await.unwrap();
    pool.unpin("a").await.unwrap();
    pool.set_budget(Bytes(1000)).await.unwrap();
    answers(&pool, "b").await;
    let lease = pool.handle("b").unwrap().lease().await.unwrap();
    let other = pool.handle("a").unwrap().lease().await.unwrap();
    pool.set_budget(Bytes(150)).await.unwrap();
    pool.pin("a").await.unwrap();
    pool.pin("b").await.unwrap();
    pool.status().await.unwrap();
    let warned = log.lines("pinned models hold more");
    assert!(warned.len() == 2 && warned[1].contains("pinned=200 B budget=150 B"), "{warned:?}");
    drop((lease, other));
}

#[tokio::test(start_paused = true)]
async fn residents_and_simulations_go_by_the_budget_of_now_less_what_is_spare() {
    let backends = ["a", "b"].map(|name| FakeBackend::local(name, 50));
    let resident = |name: &str, backend| ModelSpec { class: Class::Resident, ..model(name, &[backend]) };
    let models = ["a", "b"].iter().zip(&backends).map(|(name, backend)| resident(name, backend));
    let pool = pool(limits(6400, 3).with_spare(), models);
    let trace = [TracedRequest { at: Duration::ZERO, model: "a".parse().unwrap(), runs: Duration::ZERO }];
    let replay = Replay {
        budget: None,
        max_concurrent_llms: None,
        eviction: Eviction::Lru,
        load_time_per_gb: Duration::from_secs(1),
    };
    assert_eq!(pool.simulate(&trace, &replay).await.unwrap().budget_bytes, Bytes(6400));
    pool.set_budget(Bytes(100)).await.unwrap();
    let played = pool.simulate(&trace, &replay).await.unwrap();
    assert_eq!((played.budget_bytes, played.simulated.served), (Bytes(100), 1));
    for (name, loaded) in pool.load_residents().await {
        let error = loaded.unwrap_err();
        let needs = matches!(error, Error::ResidentsOverBudget { asked: Bytes(101), budget: Bytes(100), .. });
        assert!(needs, "{name}: {error}");
    }
    pool.set_budget(Bytes(101)).await.unwrap();
    for (name, loaded) in pool.load_residents().await {
        loaded.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_plan_says_how_long_it_takes_as_far_as_that_is_known() {
    let (a, b) = (FakeBackend::local("a", 60), FakeBackend::local("b", 60));
    let remote = FakeBackend::local("remote", 0);
    let models = [model("a", &[&a]), model("b", &[&b]), model("remote", &[&remote])];
    let pool = pool(Limits { max_concurrent_llms: 3, ..limits(100, 3) }, models);
    let plan = async |name: &str| pool.plan(&[name]).await.unwrap().remove(0);
    let first = plan("a").await;
    assert_eq!((first.freeing_seconds, first.load_seconds), (Some(0.0), None), "never loaded");
    assert_eq!(plan("remote").await.load_seconds, Some(0.0));
    answers(&pool, "a").await;
    let second = plan("b").await;
    assert_eq!((second.evict.len(), second.freeing_seconds), (1, None), "never unloaded");
    answers(&pool, "b").await;
    answers(&pool, "a").await;
    assert_eq!(plan("b").await.freeing_seconds, Some(0.0));
}

#[tokio::test(start_paused = true)]
async fn who_gives_memory_back_is_logged_with_what_that_was_decided_by() {
    let (log, _listening) = Log::listen();
    let (a, b) = (FakeBackend::local("a", 60), FakeBackend::local("b", 60));
    let pool = pool(limits(100, 3), [model("a", &[&a]), model("b", &[&b])]);
    answers(&pool, "a").await;
    assert_eq!(phase(&pool, "a").await, (Phase::Ready, 0));
    tokio::time::advance(Duration::from_secs(7)).await;
    answers(&pool, "b").await;
    let said = log.lines("gives memory back");
    assert_eq!(said.len(), 1, "{said:?}");
    for part in [
        "INFO",
        "model=a",
        r#"cause="evicted""#,
        "idle=7",
        "bytes=60 B",
        "uses=1",
        "used=60 B",
        "limit=100 B",
    ] {
        assert!(said[0].contains(part), "{part}: {said:?}");
    }
    for part in ["load=", "score="] {
        assert!(said[0].contains(part), "{part}: {said:?}");
    }
}

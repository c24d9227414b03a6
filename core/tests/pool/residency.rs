use sarai_core::config::{Class, ModelRole};
use sarai_core::memory::Probe;
use sarai_core::pool::{ModelPool, ModelSpec, PoolEvent};
use sarai_core::scheduler::{Cause, Phase};
use sarai_core::testing::{FakeBackend, FakeProbe};
use sarai_core::units::Bytes;
use sarai_core::{Error, ErrorKind};

use std::sync::Arc;

use futures::{FutureExt, StreamExt};

use super::{ask, limits, model, phase, pool, read, until};

#[tokio::test(start_paused = true)]
async fn three_llms_and_two_helpers_are_resident_at_once_and_a_fourth_evicts_the_oldest() {
    let backends: Vec<_> = ["a", "b", "c", "d"].map(|name| FakeBackend::local(name, 100)).into();
    let helpers: Vec<_> = ["embedding", "router"].map(|name| FakeBackend::local(name, 10)).into();
    let mut specs: Vec<_> =
        ["a", "b", "c", "d"].iter().zip(&backends).map(|(name, b)| model(name, &[b])).collect();
    for (name, backend) in ["embedding", "router"].iter().zip(&helpers) {
        let mut spec = model(name, &[backend]);
        (spec.role, spec.class) = (ModelRole::Embedding, Class::Resident);
        specs.push(spec);
    }
    let pool = pool(limits(1000, 3), specs);
    for (name, result) in pool.load_residents().await {
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for name in ["b", "a", "c"] {
        read(ask(&pool, name).await.unwrap()).await.1.unwrap();
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
    }
    let usage = pool.memory_usage().await.unwrap();
    assert_eq!(usage.models.iter().filter(|model| model.state == "ready").count(), 5);
    assert_eq!((usage.used_bytes, usage.llms), (Bytes(320), 3));

    read(ask(&pool, "d").await.unwrap()).await.1.unwrap();
    assert_eq!(phase(&pool, "b").await.0, Phase::Absent);
    assert_eq!(backends.iter().map(FakeBackend::loaded).collect::<Vec<_>>(), [1, 0, 1, 1]);
    assert_eq!(helpers.iter().map(FakeBackend::loaded).collect::<Vec<_>>(), [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn with_three_busy_a_fourth_waits_and_then_runs() {
    let backends: Vec<_> = ["a", "b", "c", "d"].map(|name| FakeBackend::local(name, 100)).into();
    let pool =
        pool(limits(1000, 3), ["a", "b", "c", "d"].iter().zip(&backends).map(|(name, b)| model(name, &[b])));
    let mut busy = Vec::new();
    for name in ["a", "b", "c"] {
        busy.push(pool.handle(name).unwrap().lease().await.unwrap());
    }
    let mut fourth = Box::pin(ask(&pool, "d"));
    assert!(fourth.as_mut().now_or_never().is_none());
    until(async || phase(&pool, "d").await.0 == Phase::Waiting).await;
    drop(busy.remove(1));
    let (text, answer) = read(fourth.await.unwrap()).await;
    assert_eq!(text, "ok");
    assert!(answer.unwrap().provenance.fallback_reason.is_none());
    assert_eq!(backends[1].loaded(), 0);
}

#[tokio::test(start_paused = true)]
async fn five_models_in_a_row_under_a_budget_for_two_never_exceed_it_at_any_event() {
    let names = ["a", "b", "c", "d", "e"];
    let backends: Vec<_> = names.map(|name| FakeBackend::local(name, 100)).into();
    let pool = pool(limits(200, 9), names.iter().zip(&backends).map(|(name, b)| model(name, &[b])));
    let mut events = pool.events();
    for name in names {
        read(ask(&pool, name).await.unwrap()).await.1.unwrap();
    }
    let mut changes = 0;
    while let Some(Some(event)) = events.next().now_or_never() {
        if let PoolEvent::Slot(change) = event {
            assert!(change.used <= Bytes(200), "{change:?}");
            changes += 1;
        }
    }
    assert!(changes >= 5 * 4 + 3, "{changes} changes are too few to have shown anything");
    assert_eq!(pool.status().await.unwrap().peak, Bytes(200));
}

#[tokio::test(start_paused = true)]
async fn a_model_larger_than_the_budget_is_refused_and_nothing_is_evicted() {
    let (small, huge) = (FakeBackend::local("small", 100), FakeBackend::local("huge", 5000));
    let pool = pool(limits(1000, 3), [model("small", &[&small]), model("huge", &[&huge])]);
    pool.load("small").await.unwrap();
    let error = pool.get("huge").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OverBudget);
    assert_eq!(
        error.to_string(),
        "model huge needs 5.0 kB, but at most 1.0 kB of the budget of 1.0 kB can be freed for it"
    );
    assert_eq!((small.loaded(), huge.loads()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn unknown_and_mistyped_names_are_told_apart() {
    let pool = pool(limits(1000, 3), [model("solar", &[&FakeBackend::local("solar", 1)])]);
    let message = async |name: &str| pool.get(name).await.unwrap_err().to_string();
    assert_eq!(message("soler").await, "unknown model \"soler\", did you mean \"solar\"?");
    assert_eq!(message("qwen").await, "unknown model \"qwen\"");
}

#[tokio::test(start_paused = true)]
async fn a_backend_is_told_what_the_machine_has_left_when_that_is_less_than_the_budget() {
    let (backend, probe) = (FakeBackend::local("a", 100), Arc::new(FakeProbe::new(Bytes(5000))));
    let builder = ModelPool::builder(limits(1000, 3)).model(model("a", &[&backend]));
    let pool = builder.probe(Arc::clone(&probe) as Arc<dyn Probe>).build().unwrap();
    pool.load("a").await.unwrap();
    assert_eq!(backend.told_available(), Bytes(1000), "the budget is less");
    pool.unload("a").await.unwrap();
    probe.set_available(Bytes(700));
    pool.load("a").await.unwrap();
    // A sixteenth of its memory is left alone.
    assert_eq!(backend.told_available(), Bytes(700 - 5000 / 16), "the machine has less");
}

#[tokio::test(start_paused = true)]
async fn a_budget_beyond_the_machine_is_what_the_machine_can_have() {
    let backend = FakeBackend::local("a", 4700);
    let builder = ModelPool::builder(limits(90_000, 3)).model(model("a", &[&backend]));
    let pool = builder.probe(Arc::new(FakeProbe::new(Bytes(5000)))).build().unwrap();
    assert_eq!(pool.status().await.unwrap().budget, Bytes(5000 - 5000 / 16));
    assert!(matches!(pool.load("a").await, Err(Error::OverBudget { .. })));
    pool.set_budget(Bytes(20_000)).await.unwrap();
    assert_eq!(pool.status().await.unwrap().budget, Bytes(5000 - 5000 / 16));
}

#[tokio::test(start_paused = true)]
async fn idle_models_go_when_the_kernel_says_that_memory_is_short_and_come_back_later() {
    let (backend, probe) = (FakeBackend::local("a", 600), Arc::new(FakeProbe::new(Bytes(5000))));
    let builder = ModelPool::builder(limits(1000, 3)).model(model("a", &[&backend]));
    let pool = builder.probe(Arc::clone(&probe) as Arc<dyn Probe>).build().unwrap();
    pool.load("a").await.unwrap();
    let mut events = pool.events();
    let mut unloaded = async || {
        while let Some(event) = events.next().await {
            if let PoolEvent::Slot(change) = event
                && change.to == Phase::Absent
            {
                return change.cause;
            }
        }
        panic!("the pool ended");
    };
    probe.set_available(Bytes(500));
    probe.press();
    assert_eq!(unloaded().await, Cause::Pressure);
    // Whoever needs it waits until the machine has room, and hears what it lacks when that takes too long.
    let handle = pool.handle("a").unwrap();
    let short = handle.lease().await.unwrap_err().to_string();
    assert!(short.contains("the machine has memory for 188 B of models just now"), "{short}");
    let waiting = tokio::spawn(async move { handle.lease().await.map(drop) });
    tokio::task::yield_now().await;
    probe.set_available(Bytes(3000));
    waiting.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn unload_gives_the_bytes_back_and_a_used_model_is_not_unloaded() {
    let backend = FakeBackend::local("a", 100);
    let pool = pool(limits(1000, 3), [model("a", &[&backend])]);
    assert_eq!(pool.unload("a").await.unwrap(), Bytes::ZERO);
    let lease = pool.handle("a").unwrap().lease().await.unwrap();
    assert!(matches!(pool.unload("a").await, Err(Error::InUse { leases: 1, .. })));
    drop(lease);
    assert_eq!(pool.unload("a").await.unwrap(), Bytes(100));
    assert_eq!(backend.loaded(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_plan_shows_each_place_and_loads_nothing() {
    let (remote, local) = (FakeBackend::local("remote", 0), FakeBackend::local("local", 600));
    let other = FakeBackend::local("other", 600);
    let pool = pool(limits(1000, 3), [model("solar", &[&remote, &local]), model("other", &[&other])]);
    pool.load("other").await.unwrap();
    let plan = pool.plan(&["solar"]).await.unwrap();
    assert_eq!(plan.iter().map(|p| (p.fallback, p.fits)).collect::<Vec<_>>(), [(false, true), (true, true)]);
    assert!(plan[0].evict.is_empty());
    assert_eq!(plan[1].evict.iter().map(ToString::to_string).collect::<Vec<_>>(), ["other"]);
    assert_eq!(remote.loads() + local.loads(), 0);
    let json = serde_json::to_value(&plan[1]).unwrap();
    assert_eq!(json["estimate"]["total"], 600);
}

#[tokio::test(start_paused = true)]
async fn a_model_whose_context_became_shorter_answers_and_says_so() {
    let (a, b) = (FakeBackend::local("a", 60).context(40), FakeBackend::local("b", 60));
    let pool = pool(limits(100, 3), [model("a", &[&a]), model("b", &[&b])]);
    let n_ctx = async || read(ask(&pool, "a").await.unwrap()).await.1.unwrap().provenance.n_ctx;
    assert_eq!(n_ctx().await, Some(512));
    let plan = &pool.plan(&["b"]).await.unwrap()[0];
    assert_eq!((plan.evict.len(), plan.shorten.len(), plan.fits), (0, 1, true));
    read(ask(&pool, "b").await.unwrap()).await.1.unwrap();
    assert_eq!(n_ctx().await, Some(256));
    assert_eq!((a.loads(), a.loaded(), b.loaded()), (1, 1, 1));
    assert_eq!(pool.memory_usage().await.unwrap().used_bytes, Bytes(100));
}

#[tokio::test(start_paused = true)]
async fn residents_that_do_not_fit_together_are_refused_at_the_start_with_their_sum() {
    let backends = ["a", "b", "c"].map(|name| FakeBackend::local(name, 40));
    let resident = |name: &str, backend| ModelSpec { class: Class::Resident, ..model(name, &[backend]) };
    let models = ["a", "b", "c"].iter().zip(&backends).map(|(name, backend)| resident(name, backend));
    let pool = pool(limits(100, 3), models);
    for (name, result) in pool.load_residents().await {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OverBudget, "{name}");
        let text = error.to_string();
        assert!(text.contains("need 120 B together, more than the budget of 100 B"), "{text}");
    }
    assert!(backends.iter().all(|backend| backend.loads() == 0));
}

//! Several pools that hold one budget together, as several processes do.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sarai_core::Error;
use sarai_core::memory::SharedBudget;
use sarai_core::pool::ModelPool;
use sarai_core::scheduler::Phase;
use sarai_core::testing::{FakeBackend, FakeProbe};
use sarai_core::units::Bytes;

use super::{ask, limits, model, phase, read, until};

fn sharing(folder: &Path, models: &[(&str, &FakeBackend)]) -> ModelPool {
    let builder = ModelPool::builder(limits(100, 3))
        .probe(Arc::new(FakeProbe::new(Bytes::from_gb(16.0))))
        .share_budget(SharedBudget::join(folder).unwrap());
    models
        .iter()
        .fold(builder, |builder, (name, backend)| builder.model(model(name, &[backend])))
        .build()
        .unwrap()
}

async fn answers(pool: &ModelPool, name: &str) {
    read(ask(pool, name).await.unwrap()).await.1.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_another_process_waits_for_is_freed_by_those_who_have_it_idle() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (FakeBackend::local("a", 70), FakeBackend::local("b", 60));
    let first = sharing(folder.path(), &[("a", &a)]);
    let second = sharing(folder.path(), &[("b", &b)]);
    answers(&first, "a").await;
    answers(&second, "b").await;
    assert_eq!((a.loaded(), b.loaded()), (0, 1), "the idle one has left");
    answers(&first, "a").await;
    assert_eq!((a.loaded(), b.loaded()), (1, 0));
    // Both fit when their contexts are short, and nobody has to go.
    let (c, d) = (FakeBackend::local("c", 60).context(40), FakeBackend::local("d", 60).context(40));
    let third = sharing(folder.path(), &[("c", &c)]);
    let fourth = sharing(folder.path(), &[("d", &d)]);
    answers(&third, "c").await;
    answers(&fourth, "d").await;
    assert_eq!((c.loaded(), d.loaded()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn what_another_process_uses_is_waited_for_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (FakeBackend::local("a", 70), FakeBackend::local("b", 60));
    let first = sharing(folder.path(), &[("a", &a)]);
    let second = sharing(folder.path(), &[("b", &b)]);
    let used = first.handle("a").unwrap().lease().await.unwrap();
    let error = ask(&second, "b").await.err().unwrap();
    assert!(matches!(error, Error::WaitTimeout { others: Bytes(70), .. }), "{error:?}");
    assert!(error.to_string().contains("other processes have 70 B"), "{error}");
    let mut waiting = Box::pin(ask(&second, "b"));
    assert!(futures::FutureExt::now_or_never(waiting.as_mut()).is_none());
    until(async || phase(&second, "b").await.0 == Phase::Waiting).await;
    drop(used);
    read(waiting.await.unwrap()).await.1.unwrap();
    assert_eq!((a.loaded(), b.loaded()), (0, 1));
    assert_eq!(second.memory_usage().await.unwrap().others_bytes, Bytes::ZERO);
}

#[tokio::test(start_paused = true)]
async fn of_two_who_take_the_last_room_at_once_one_waits() {
    let folder = tempfile::tempdir().unwrap();
    let backends = ["a", "b"].map(|name| FakeBackend::local(name, 70).loads_wait());
    let pools = [("a", &backends[0]), ("b", &backends[1])].map(|one| sharing(folder.path(), &[one]));
    let (first, second) = tokio::join!(
        async {
            until(async || backends.iter().any(|backend| backend.loads() > 0)).await;
            assert_eq!(backends.iter().map(FakeBackend::loads).sum::<usize>(), 1);
            backends.iter().for_each(FakeBackend::finish_load);
        },
        futures::future::join_all(["a", "b"].iter().zip(&pools).map(|(name, pool)| answers(pool, name)))
    );
    assert_eq!((first, second.len()), ((), 2));
    assert_eq!(backends.iter().map(FakeBackend::loaded).sum::<usize>(), 1);
}

/// In the place of a folder that cannot be used any more.
fn make_unusable(folder: &Path) {
    std::fs::remove_dir_all(folder).unwrap();
    std::fs::write(folder, "not a folder").unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_folder_that_cannot_be_used_any_more_leaves_each_with_its_own_budget() {
    let above = tempfile::tempdir().unwrap();
    let folder = above.path().join("budget");
    let (a, b) = (FakeBackend::local("a", 70), FakeBackend::local("b", 60));
    let first = sharing(&folder, &[("a", &a)]);
    let second = sharing(&folder, &[("b", &b)]);
    let used = first.handle("a").unwrap().lease().await.unwrap();
    let mut waiting = Box::pin(ask(&second, "b"));
    assert!(futures::FutureExt::now_or_never(waiting.as_mut()).is_none());
    until(async || phase(&second, "b").await.0 == Phase::Waiting).await;
    // What the other one had is not reckoned with for ever.
    make_unusable(&folder);
    read(waiting.await.unwrap()).await.1.unwrap();
    assert_eq!((a.loaded(), b.loaded()), (1, 1));
    assert_eq!(second.memory_usage().await.unwrap().others_bytes, Bytes::ZERO);
    // When it can be used again, the budget is one again.
    std::fs::remove_file(&folder).unwrap();
    drop(used);
    until(async || {
        tokio::time::advance(Duration::from_secs(1)).await;
        second.memory_usage().await.unwrap().others_bytes + first.memory_usage().await.unwrap().others_bytes
            > Bytes::ZERO
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_folder_that_was_removed_is_made_again_and_shared() {
    let above = tempfile::tempdir().unwrap();
    let folder = above.path().join("budget");
    let (a, b) = (FakeBackend::local("a", 70), FakeBackend::local("b", 60));
    let first = sharing(&folder, &[("a", &a)]);
    let second = sharing(&folder, &[("b", &b)]);
    answers(&first, "a").await;
    std::fs::remove_dir_all(&folder).unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    answers(&second, "b").await;
    assert_eq!((a.loaded(), b.loaded()), (0, 1), "the idle one has left for the other");
}

#[tokio::test(start_paused = true)]
async fn a_context_that_becomes_shorter_is_not_refused_for_what_others_have() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (FakeBackend::local("a", 60).context(40), FakeBackend::local("b", 30));
    let first = sharing(folder.path(), &[("a", &a), ("b", &b)]);
    let mut other = SharedBudget::join(folder.path()).unwrap();
    answers(&first, "a").await;
    other.state(Bytes(10), Bytes::ZERO).unwrap();
    // It takes more than it was estimated at: another one's context becomes shorter for that, at once.
    b.takes(45);
    answers(&first, "b").await;
    until(async || first.memory_usage().await.unwrap().models[0].n_ctx == Some(256)).await;
    until(async || phase(&first, "a").await.0 == Phase::Ready).await;
    assert_eq!(first.memory_usage().await.unwrap().used_bytes, Bytes(40 + 45));
    assert_eq!((a.loads(), a.loaded(), b.loaded()), (1, 1, 1));
}

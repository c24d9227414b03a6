use std::time::Duration;

use futures::StreamExt;
use sarai_core::answer::AnswerEvent;
use sarai_core::failure::FailureKind;
use sarai_core::pool::{ModelPool, PlaceSpec, PoolEvent};
use sarai_core::testing::FakeBackend;
use sarai_core::{Error, ErrorKind};

use super::{ask, limits, model, pool, read};

fn solar(remote: &FakeBackend, local: &FakeBackend) -> ModelPool {
    pool(limits(1000, 1), [model("solar", &[remote, local])])
}

#[tokio::test(start_paused = true)]
async fn every_failure_before_the_first_token_that_allows_it_is_answered_by_the_next_place_which_says_so() {
    let kinds = [
        FailureKind::Unreachable,
        FailureKind::Timeout,
        FailureKind::HostError,
        FailureKind::Busy,
        FailureKind::ModelMissing,
        FailureKind::Protocol,
        FailureKind::CutOff,
        FailureKind::Denied,
        FailureKind::Engine,
        FailureKind::EngineGone,
    ];
    for kind in kinds {
        let remote = FakeBackend::local("remote", 0).says(&[]).fails(kind);
        let local = FakeBackend::local("local", 100).says(&["from ", "here"]);
        let pool = solar(&remote, &local);
        let (text, answer) = read(ask(&pool, "solar").await.unwrap()).await;
        let provenance = answer.unwrap().provenance;
        assert_eq!(text, "from here");
        assert_eq!(provenance.served_by.to_string(), "gguf_native:local");
        assert_eq!(
            provenance.fallback_reason.as_deref(),
            Some(format!("gguf_native:remote: scripted {}", kind.as_str()).as_str())
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_first_choice_that_answers_is_served_without_a_reason() {
    let (remote, local) = (FakeBackend::local("remote", 0), FakeBackend::local("local", 100));
    let pool = solar(&remote, &local);
    let (_, answer) = read(ask(&pool, "solar").await.unwrap()).await;
    let answer = answer.unwrap();
    assert_eq!(answer.provenance.served_by.to_string(), "gguf_native:remote");
    assert_eq!(answer.provenance.fallback_reason, None);
    assert_eq!((answer.tokens_per_second, answer.ttft_ms), (Some(1.0), Some(0)));
    assert_eq!(local.loads(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_with_the_request_is_not_tried_elsewhere() {
    for kind in [FailureKind::ContextOverflow, FailureKind::BadRequest, FailureKind::Refused] {
        let remote = FakeBackend::local("remote", 0).says(&[]).fails(kind);
        let local = FakeBackend::local("local", 100);
        let error = ask(&solar(&remote, &local), "solar").await.err().expect("an error");
        assert!(matches!(error, Error::Request { cause, .. } if cause.kind == kind));
        assert_eq!(local.loads(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn after_the_first_token_a_failure_ends_the_stream_and_nothing_is_spliced() {
    let remote = FakeBackend::local("remote", 0).says(&["half an ans"]).fails(FailureKind::CutOff);
    let local = FakeBackend::local("local", 100);
    let pool = solar(&remote, &local);
    let (text, end) = read(ask(&pool, "solar").await.unwrap()).await;
    assert_eq!(text, "half an ans");
    assert!(matches!(end, Err(Error::Request { cause, .. }) if cause.kind == FailureKind::CutOff));
    assert_eq!(local.requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn when_everything_fails_the_error_tells_the_first_and_the_last_cause() {
    let remote = FakeBackend::local("remote", 0).says(&[]).fails(FailureKind::Unreachable);
    let local = FakeBackend::local("local", 100).estimate_fails(FailureKind::FileMissing);
    let error = ask(&solar(&remote, &local), "solar").await.err().expect("an error");
    let text = error.to_string();
    assert!(text.contains("scripted unreachable") && text.contains("scripted file_missing"), "{text}");
    assert_eq!(error.kind(), ErrorKind::Unreachable, "a fallback that is not there is none");
}

#[tokio::test(start_paused = true)]
async fn a_local_first_choice_that_does_not_fit_goes_to_the_host() {
    let local = FakeBackend::local("local", 5000);
    let remote = FakeBackend::local("remote", 0).says(&["far"]);
    let (text, answer) = read(ask(&solar(&local, &remote), "solar").await.unwrap()).await;
    assert_eq!(text, "far");
    assert!(answer.unwrap().provenance.fallback_reason.unwrap().contains("needs 5.0 kB"));
}

#[tokio::test(start_paused = true)]
async fn a_busy_first_choice_leaves_half_of_the_wait_to_the_second() {
    let (first, second) = (FakeBackend::local("first", 100).hangs(), FakeBackend::local("second", 0));
    let pool = solar(&first, &second);
    let busy = ask(&pool, "solar").await.unwrap();
    let before = tokio::time::Instant::now();
    let (_, answer) = read(ask(&pool, "solar").await.unwrap()).await;
    assert_eq!(before.elapsed(), Duration::from_secs(150), "half of five minutes");
    let provenance = answer.unwrap().provenance;
    assert_eq!(provenance.served_by.to_string(), "gguf_native:second");
    assert!(provenance.fallback_reason.unwrap().contains("was not ready within 150.0 s"));
    drop(busy);
}

#[tokio::test(start_paused = true)]
async fn with_all_llms_pinned_a_fallback_that_is_loaded_answers() {
    let (own, other) = (FakeBackend::local("own", 100), FakeBackend::local("other", 100).says(&["other"]));
    let mut expert = model("expert", &[&own]);
    expert.places.push(PlaceSpec::Model("lfm2".parse().unwrap()));
    let pool = pool(limits(1000, 1), [expert, model("lfm2", &[&other])]);
    pool.load("lfm2").await.unwrap();
    pool.pin("lfm2").await.unwrap();
    let (text, answer) = read(ask(&pool, "expert").await.unwrap()).await;
    assert_eq!(text, "other");
    assert!(answer.unwrap().provenance.fallback_reason.unwrap().contains("max_concurrent_llms is 1"));
    assert_eq!(own.loads(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_fallback_is_announced_with_both_places() {
    let remote = FakeBackend::local("remote", 0).says(&[]).fails(FailureKind::Busy);
    let local = FakeBackend::local("local", 100);
    let pool = solar(&remote, &local);
    let events = pool.events();
    read(ask(&pool, "solar").await.unwrap()).await.1.unwrap();
    drop(pool);
    let announced = events.filter_map(async |event| match event {
        PoolEvent::Fallback { from, to, reason, .. } => Some(format!("{from} -> {to}: {reason}")),
        _ => None,
    });
    let announced: Vec<_> = announced.collect().await;
    assert_eq!(announced, ["gguf_native:remote -> gguf_native:local: gguf_native:remote: scripted busy"]);
}

#[tokio::test(start_paused = true)]
async fn embedding_requests_fall_back_too() {
    let first = FakeBackend::local("first", 1).fails(FailureKind::Engine);
    let second = FakeBackend::local("second", 1);
    let pool = pool(limits(1000, 1), [model("embedding", &[&first, &second])]);
    let handle = pool.handle("embedding").unwrap();
    let (embeddings, provenance) =
        handle.embed(vec!["a".to_owned(), "b".to_owned()], Default::default()).await.unwrap();
    assert_eq!(embeddings.vectors.len(), 2);
    assert_eq!(provenance.served_by.to_string(), "gguf_native:second");
}

#[tokio::test(start_paused = true)]
async fn the_remote_and_the_local_place_of_a_model_take_one_place_among_the_llms() {
    let remote = FakeBackend::local("remote", 0).says(&[]).fails(FailureKind::Unreachable);
    let local = FakeBackend::local("local", 100);
    let pool = solar(&remote, &local);
    for _ in 0..3 {
        let mut stream = ask(&pool, "solar").await.unwrap();
        assert!(matches!(stream.next().await, Some(Ok(AnswerEvent::Text(_)))));
        assert_eq!(pool.status().await.unwrap().llms, 1);
    }
    assert_eq!(local.loads(), 1);
}

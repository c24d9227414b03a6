//! A place that fails in the middle of an answer, and a host that is slow.

use std::time::Duration;

use futures::StreamExt;
use sarai_core::Error;
use sarai_core::answer::{Answer, AnswerEvent, CallOptions, OnStreamFailure};
use sarai_core::failure::FailureKind;
use sarai_core::pool::{ModelPool, ModelSpec, PlaceSpec};
use sarai_core::request::{GenerateRequest, Message, Tool, Truncate};
use sarai_core::testing::FakeBackend;

use super::{ask, limits, model, phase, pool, read, until};

/// SOLAR on a host, and from a file, going on where the host fails.
fn solar(places: &[&FakeBackend]) -> ModelSpec {
    ModelSpec { on_stream_failure: OnStreamFailure::Continue, ..model("solar", places) }
}

fn handovers(answer: &Answer) -> Vec<(usize, String, String)> {
    let each = answer.handovers.iter();
    each.map(|handover| (handover.at, handover.from.to_string(), handover.to.to_string())).collect()
}

const ANSWER: [&str; 4] = ["una ", "res", "puesta ", "entera 😀"];

#[tokio::test(start_paused = true)]
async fn the_next_place_goes_on_where_the_host_has_failed_and_the_answer_says_where() {
    for said in 1..=4 {
        let remote = FakeBackend::remote("lan").says(&ANSWER[..said]).fails(FailureKind::CutOff);
        let local = FakeBackend::local("local", 100).says(&ANSWER);
        let pool = pool(limits(1000, 1), [solar(&[&remote, &local])]);
        let (text, answer) = read(ask(&pool, "solar").await.unwrap()).await;
        let answer = answer.unwrap();
        assert_eq!(text, ANSWER.concat(), "nothing is lost or said twice");
        let at = ANSWER[..said].concat().chars().count();
        assert_eq!(handovers(&answer), [(at, "ollama_http:lan".to_owned(), "gguf_native:local".to_owned())]);
        assert_eq!(answer.handovers[0].reason, "scripted cut_off");
        assert_eq!(answer.provenance.served_by.to_string(), "gguf_native:local");
        assert_eq!(answer.provenance.fallback_reason.as_deref(), Some("ollama_http:lan: scripted cut_off"));
        let prefill = local.asked()[0].prefill.clone().unwrap();
        assert_eq!((prefill.text, prefill.tokens), (ANSWER[..said].concat(), said as u32));
        assert_eq!((phase(&pool, "solar").await.1, remote.streams(), local.streams()), (0, 0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_goes_on_as_often_as_there_are_places_and_ends_with_the_first_and_the_last_failure() {
    let first = FakeBackend::remote("a").says(&ANSWER[..1]).fails(FailureKind::CutOff);
    let second = FakeBackend::remote("b").says(&ANSWER[..2]).fails(FailureKind::Timeout);
    let third = FakeBackend::local("local", 100).says(&ANSWER);
    let all = pool(limits(1000, 1), [solar(&[&first, &second, &third])]);
    let (text, answer) = read(ask(&all, "solar").await.unwrap()).await;
    assert_eq!((text, handovers(&answer.unwrap()).len()), (ANSWER.concat(), 2));

    let two = pool(limits(1000, 1), [solar(&[&first, &second])]);
    let (text, end) = read(ask(&two, "solar").await.unwrap()).await;
    assert_eq!(text, ANSWER[..2].concat());
    let message = end.unwrap_err().to_string();
    assert!(message.contains("scripted cut_off") && message.contains("scripted timeout"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_place_that_cannot_go_on_is_passed_over() {
    let remote = FakeBackend::remote("a").says(&ANSWER[..1]).fails(FailureKind::CutOff);
    let cannot = FakeBackend::remote("b").says(&[]).fails(FailureKind::BadRequest);
    let local = FakeBackend::local("local", 100).says(&ANSWER);
    let pool = pool(limits(1000, 1), [solar(&[&remote, &cannot, &local])]);
    let (text, answer) = read(ask(&pool, "solar").await.unwrap()).await;
    assert_eq!((text, answer.unwrap().handovers.len()), (ANSWER.concat(), 1));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_dies_in_the_middle_is_gone_on_from_by_another_model() {
    let own = FakeBackend::local("own", 100).says(&ANSWER[..2]).fails(FailureKind::EngineGone);
    let other = FakeBackend::local("other", 100).says(&ANSWER);
    let mut expert = ModelSpec { name: "expert".parse().unwrap(), ..solar(&[&own]) };
    expert.places.push(PlaceSpec::Model("lfm2".parse().unwrap()));
    let pool = pool(limits(1000, 2), [expert, model("lfm2", &[&other])]);
    let (text, answer) = read(ask(&pool, "expert").await.unwrap()).await;
    assert_eq!((text, answer.unwrap().handovers.len()), (ANSWER.concat(), 1));
    until(async || own.loaded() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_may_call_tools_ends_with_its_error() {
    let remote = FakeBackend::remote("lan").says(&ANSWER[..1]).fails(FailureKind::CutOff);
    let local = FakeBackend::local("local", 100);
    let pool = pool(limits(1000, 1), [solar(&[&remote, &local])]);
    let tool = Tool { name: "t".into(), description: String::new(), parameters: serde_json::json!({}) };
    let request = GenerateRequest::chat(vec![Message::user("hello")]).with_tools(vec![tool]);
    let stream = pool.handle("solar").unwrap().generate(request, CallOptions::default()).await.unwrap();
    assert!(
        matches!(read(stream).await.1, Err(Error::Request { cause, .. }) if cause.kind == FailureKind::CutOff)
    );
    assert_eq!(local.requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_may_choose_for_itself() {
    let remote = FakeBackend::remote("lan").says(&ANSWER[..1]).fails(FailureKind::CutOff);
    let local = FakeBackend::local("local", 100).says(&ANSWER);
    let pool = pool(limits(1000, 1), [model("solar", &[&remote, &local])]);
    let options =
        CallOptions { on_stream_failure: Some(OnStreamFailure::Continue), ..CallOptions::default() };
    let request = GenerateRequest::chat(vec![Message::user("hello")]);
    let stream = pool.handle("solar").unwrap().generate(request, options).await.unwrap();
    assert_eq!(read(stream).await.0, ANSWER.concat());
}

#[tokio::test(start_paused = true)]
async fn a_reader_who_leaves_while_an_answer_looks_for_its_next_place_stops_that() {
    let remote = FakeBackend::remote("lan").says(&ANSWER[..1]).fails(FailureKind::CutOff);
    let local = FakeBackend::local("local", 100).loads_wait();
    let pool = pool(limits(1000, 1), [solar(&[&remote, &local])]);
    let mut stream = ask(&pool, "solar").await.unwrap();
    assert!(matches!(stream.next().await, Some(Ok(AnswerEvent::Text(_)))));
    assert!(futures::poll!(stream.next()).is_pending());
    until(async || local.loads() == 1).await;
    drop(stream);
    until(async || local.cancelled_loads() == 1).await;
    assert_eq!(phase(&pool, "solar").await.1, 0);
}

#[tokio::test(start_paused = true)]
async fn a_substitute_with_a_shorter_context_leaves_old_messages_out() {
    let remote = FakeBackend::remote("lan").says(&[]).fails(FailureKind::Unreachable);
    let local = FakeBackend::local("local", 100);
    let pool = pool(limits(1000, 1), [model("solar", &[&remote, &local])]);
    read(ask(&pool, "solar").await.unwrap()).await.1.unwrap();
    assert_eq!(remote.asked()[0].truncate, Truncate::Error);
    assert_eq!(local.asked()[0].truncate, Truncate::Oldest);
}

fn hedged(places: &[&FakeBackend]) -> ModelSpec {
    ModelSpec { hedge_after: Some(Duration::from_secs(5)), ..model("solar", places) }
}

/// Waits on the clock of the test for so long, with a request on its way.
async fn ask_for(pool: &ModelPool, time: Duration) {
    assert!(tokio::time::timeout(time, ask(pool, "solar")).await.is_err(), "the host says nothing");
}

#[tokio::test(start_paused = true)]
async fn while_a_host_is_slow_its_substitute_is_made_ready() {
    let remote = FakeBackend::remote("lan").says(&[]).hangs();
    let local = FakeBackend::local("local", 100);
    let pool = pool(limits(1000, 1), [hedged(&[&remote, &local])]);
    ask_for(&pool, Duration::from_secs(4)).await;
    assert_eq!(local.loads(), 0);
    ask_for(&pool, Duration::from_secs(6)).await;
    assert_eq!((local.loads(), local.loaded(), local.requests()), (1, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_substitute_that_is_made_ready_takes_no_room_from_a_model_that_was_just_used() {
    let remote = FakeBackend::remote("lan").says(&[]).hangs();
    let (local, other) = (FakeBackend::local("local", 600), FakeBackend::local("other", 600));
    let pool = pool(limits(1000, 2), [hedged(&[&remote, &local]), model("lfm2", &[&other])]);
    read(ask(&pool, "lfm2").await.unwrap()).await.1.unwrap();
    ask_for(&pool, Duration::from_secs(30)).await;
    assert_eq!((local.loads(), other.loaded()), (0, 1));
    tokio::time::advance(Duration::from_secs(120)).await;
    ask_for(&pool, Duration::from_secs(30)).await;
    assert_eq!((local.loads(), other.loaded()), (1, 0), "it was long idle");
}

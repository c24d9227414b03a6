#![cfg(target_os = "linux")]

use std::time::Duration;

use futures::StreamExt;
use sarai_agents::llama::{GgufBackend, GgufSettings};
use sarai_core::backend::Backend;
use sarai_core::config::{KvCacheType, Weights};
use sarai_core::failure::FailureKind;
use sarai_core::request::Capability;
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model};

use super::{chat, file, load, read, say, seeded, settings};

/// A model large enough for its weights to be seen among a test process's own comings and goings.
fn large() -> Model {
    Model::new(Kind::Llama).n_embd(512).n_ff(2048).n_layer(6).n_head(8).n_head_kv(8)
}

#[tokio::test]
async fn a_mapped_model_is_measured_within_its_estimate_and_gone_after_its_unload() {
    let file = file(&large());
    let estimate =
        GgufBackend::new(settings(&file.path, Capability::Generate)).estimate(Bytes(1)).await.unwrap();
    let model = load(settings(&file.path, Capability::Generate)).await.unwrap();
    say(&model, chat(seeded(1))).await.unwrap();
    let measured = model.memory().unwrap();
    assert!(measured.file_backed.0 as f64 > 0.9 * estimate.weights.0 as f64, "{measured:?} {estimate:?}");
    assert!(measured.file_backed.0 <= estimate.weights.0 + (1 << 20), "{measured:?} {estimate:?}");
    model.unload().await;
    assert_eq!(model.memory().unwrap().file_backed, Bytes::ZERO);
    let failure = say(&model, chat(seeded(1))).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::EngineGone);
    model.unload().await;
}

#[tokio::test]
async fn repacked_weights_are_this_processs_own_memory_and_not_a_map() {
    let file = file(&large());
    let mut settings = settings(&file.path, Capability::Generate);
    settings.weights = Weights::Repack;
    let model = load(settings).await.unwrap();
    assert_eq!(model.memory().unwrap().file_backed, Bytes::ZERO);
    let (text, _) = say(&model, chat(seeded(1))).await.unwrap();
    assert!(!text.is_empty());
}

#[tokio::test]
async fn keys_and_values_of_every_type_are_of_use() {
    use KvCacheType::{Bf16, F16, F32, Iq4Nl, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    let file = file(&large());
    for kv_cache_type in [F32, F16, Bf16, Q8_0, Q5_1, Q5_0, Q4_1, Iq4Nl, Q4_0] {
        let with = GgufSettings { kv_cache_type, ..settings(&file.path, Capability::Generate) };
        let model = load(with).await.unwrap();
        let (text, _) = say(&model, chat(seeded(1))).await.unwrap();
        assert!(!text.is_empty(), "{kv_cache_type:?}");
        model.unload().await;
    }
}

#[tokio::test]
async fn a_model_in_use_is_unloaded_without_waiting_for_its_answer() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let model = load(settings(&file.path, Capability::Generate)).await.unwrap();
    let running = model.generate(chat(Default::default())).await.unwrap();
    model.unload().await;
    assert_eq!(read(running).await.unwrap_err().kind, FailureKind::EngineGone);
}

#[tokio::test]
async fn a_reader_who_stands_still_does_not_hold_up_others_or_an_unload() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let model = load(settings(&file.path, Capability::Generate)).await.unwrap();
    let stands_still = model.generate(chat(Default::default())).await.unwrap();
    // Shares its steps with the one that is not read, up to the context's end.
    let others = tokio::time::timeout(Duration::from_secs(60), say(&model, chat(Default::default())));
    assert!(others.await.unwrap().is_ok());
    tokio::time::timeout(Duration::from_secs(60), model.unload()).await.unwrap();
    drop(stands_still);
}

#[tokio::test]
async fn a_reader_who_stands_still_and_then_leaves_gives_the_only_place_free() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let settings = GgufSettings { parallel: Some(1), ..settings(&file.path, Capability::Generate) };
    let model = load(settings).await.unwrap();
    let mut slow = model.generate(chat(Default::default())).await.unwrap();
    slow.next().await.unwrap().unwrap();
    let next = model.generate(chat(seeded(1))).await.unwrap();
    drop(slow);
    let (text, _) = read(next).await.unwrap();
    assert!(!text.is_empty());
}

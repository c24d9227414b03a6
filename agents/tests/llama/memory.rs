#![cfg(target_os = "linux")]

use sarai_agents::llama::GgufBackend;
use sarai_core::backend::Backend;
use sarai_core::config::Weights;
use sarai_core::failure::FailureKind;
use sarai_core::request::Capability;
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model};

use super::{chat, file, load, say, seeded, settings};

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
    assert_eq!(failure.kind, FailureKind::Engine);
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
async fn a_model_in_use_is_unloaded_without_waiting_for_its_answer() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let model = load(settings(&file.path, Capability::Generate)).await.unwrap();
    let running = model.generate(chat(Default::default())).await.unwrap();
    model.unload().await;
    drop(running);
}

#![cfg(target_os = "linux")]

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
async fn keys_and_values_of_every_type_are_of_the_estimated_size_and_of_use() {
    use KvCacheType::{Bf16, F16, F32, Iq4Nl, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    let file = file(&large());
    let mut sizes = Vec::new();
    for kv_cache_type in [F32, F16, Bf16, Q8_0, Q5_1, Q5_0, Q4_1, Iq4Nl, Q4_0] {
        let with = GgufSettings { kv_cache_type, ..settings(&file.path, Capability::Generate) };
        sizes.push(GgufBackend::new(with.clone()).estimate(Bytes(1)).await.unwrap().kv);
        let model = load(with).await.unwrap();
        let (text, _) = say(&model, chat(seeded(1))).await.unwrap();
        assert!(!text.is_empty(), "{kv_cache_type:?}");
        model.unload().await;
    }
    assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
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
async fn a_reader_who_stands_still_does_not_hold_up_an_unload() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stalled.gguf");
    Model::new(Kind::Llama).endless(true).write_to(&path).unwrap();
    let model = load(settings(&path, Capability::Generate)).await.unwrap();
    let stands_still = model.generate(chat(Default::default())).await.unwrap();
    // The engine has filled all places between itself and the reader when its thread does not wake up any more.
    let mut asleep = 0;
    while asleep < 1000 {
        asleep = if is_asleep("llama-stalled") { asleep + 1 } else { 0 };
        tokio::task::yield_now().await;
    }
    model.unload().await;
    assert!(!is_asleep("llama-stalled"), "the thread is gone");
    drop(stands_still);
}

/// Whether this process has a thread of that name, and it waits for something.
fn is_asleep(name: &str) -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    threads.flatten().any(|thread| {
        // A thread that ends meanwhile leaves nothing to read.
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let after_name = stat.split_once(&format!("({name})")).map(|(_, rest)| rest.trim_start().to_owned());
        after_name.is_some_and(|rest| rest.starts_with('S'))
    })
}

//! How weights are held, and adapters on them.

use std::path::{Path, PathBuf};

use sarai_agents::llama::GgufSettings;
use sarai_core::config::Weights;
use sarai_core::failure::FailureKind;
use sarai_core::request::{Capability, Sampling};
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model, Tensor, TensorType, Writer};

use super::{assert_alike, chat, file, load, say, settings};

fn greedy() -> Sampling {
    Sampling { temperature: Some(0.0), max_tokens: Some(24), ..Sampling::default() }
}

/// An adapter of rank 4 on the output matrix's neighbours: it changes what the first block's queries see.
fn adapter(folder: &Path, name: &str, architecture: &str, width: u64) -> PathBuf {
    let mut writer = Writer::new();
    writer.set("general.architecture", architecture);
    writer.set("general.type", "adapter");
    writer.set("adapter.type", "lora");
    writer.set("adapter.lora.alpha", 4.0_f32);
    for (part, shape) in [("lora_a", [width, 4]), ("lora_b", [4, width])] {
        let fill = |row: u64, out: &mut [f32]| {
            out.iter_mut().enumerate().for_each(|(at, x)| *x = ((row as usize + at) % 7) as f32 - 3.0);
        };
        writer.push(Tensor::new(format!("blk.0.attn_output.weight.{part}"), shape, TensorType::F32, fill));
    }
    let path = folder.join(name);
    writer.create(&path).unwrap();
    path
}

#[tokio::test]
async fn an_adapter_changes_one_model_and_not_the_other_on_the_same_file() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let folder = tempfile::tempdir().unwrap();
    let path = adapter(folder.path(), "a.gguf", "llama", 192);
    let with = |scale| GgufSettings {
        lora: vec![(path.clone(), scale)],
        ..settings(&file.path, Capability::Generate)
    };
    let plain = load(settings(&file.path, Capability::Generate)).await.unwrap();
    let before = say(&plain, chat(greedy())).await.unwrap().0;
    let adapted = load(with(1.0)).await.unwrap();
    assert_ne!(say(&adapted, chat(greedy())).await.unwrap().0, before);
    assert_eq!(say(&plain, chat(greedy())).await.unwrap().0, before);
    let none = load(with(0.0)).await.unwrap();
    assert_eq!(say(&none, chat(greedy())).await.unwrap().0, before);
    adapted.unload().await;
    assert_eq!(say(&plain, chat(greedy())).await.unwrap().0, before);
}

#[tokio::test]
async fn an_adapter_that_is_none_or_another_models_fails_the_load_by_name() {
    let file = file(&Model::new(Kind::Llama));
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.gguf");
    std::fs::write(&broken, "GGUF").unwrap();
    let adapters = [
        folder.path().join("missing.gguf"),
        broken,
        file.path.clone(),
        adapter(folder.path(), "other.gguf", "qwen2", 192),
        adapter(folder.path(), "wide.gguf", "llama", 256),
    ];
    for path in adapters {
        let with =
            GgufSettings { lora: vec![(path.clone(), 1.0)], ..settings(&file.path, Capability::Generate) };
        let failure = load(with).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadFile, "{}", path.display());
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(failure.to_string().contains(&name), "{failure}");
    }
    let model = load(settings(&file.path, Capability::Generate)).await.unwrap();
    assert!(say(&model, chat(greedy())).await.is_ok());
}

#[tokio::test]
async fn a_resident_model_that_leaves_it_open_is_held_in_the_way_that_was_measured() {
    for (kind, purpose) in [
        (Kind::BertEmbedding, Capability::Embed),
        (Kind::Llama, Capability::Generate),
        (Kind::Lfm2, Capability::Generate),
    ] {
        held_as_measured(kind, purpose).await;
    }
}

async fn held_as_measured(kind: Kind, purpose: Capability) {
    let file = file(&Model::new(kind));
    let folder = tempfile::tempdir().unwrap();
    let below = folder.path().join("below");
    let record = below.join("weights.json");
    let open = GgufSettings { resident: true, measurements: Some(below), ..settings(&file.path, purpose) };
    load(open.clone()).await.unwrap().unload().await;
    let remembered = std::fs::read_to_string(&record).unwrap();
    let mut remembered: serde_json::Value = serde_json::from_str(&remembered).unwrap();
    assert_eq!(remembered["entries"].as_array().unwrap().len(), 1);
    // What is remembered decides: here, the other way round.
    for wanted in [true, false] {
        remembered["entries"][0][1] = wanted.into();
        let changed = remembered.to_string();
        std::fs::write(&record, &changed).unwrap();
        let model = load(open.clone()).await.unwrap();
        let mapped = model.memory().unwrap().file_backed;
        assert_eq!(mapped == Bytes::ZERO, wanted, "{mapped}");
        model.unload().await;
        assert_eq!(std::fs::read_to_string(&record).unwrap(), changed, "nothing is measured again");
    }
    // A model that comes and goes is mapped, whatever is remembered.
    let on_demand = GgufSettings { resident: false, ..open };
    assert_ne!(load(on_demand).await.unwrap().memory().unwrap().file_backed, Bytes::ZERO);
}

#[tokio::test]
async fn the_way_weights_are_held_changes_nothing_that_is_said() {
    let file = file(&Model::new(Kind::Llama));
    let mut said = Vec::new();
    for weights in [Weights::Mmap, Weights::Repack, Weights::Auto, Weights::Mmap] {
        let model =
            load(GgufSettings { weights, ..settings(&file.path, Capability::Generate) }).await.unwrap();
        said.push(say(&model, chat(greedy()).with_logprobs(2)).await.unwrap().1);
        model.unload().await;
    }
    for other in &said[1..] {
        assert_alike(&said[0], other, "another way of holding weights");
    }
}

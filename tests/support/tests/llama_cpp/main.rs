//! The synthetic models in llama.cpp itself.

#![expect(clippy::unwrap_used, reason = "where a helper fails, the test does")]

mod embedding;
mod text;

use std::num::NonZeroU32;
use std::sync::OnceLock;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use sarai_support::gguf::{Damage, Kind, Model};

/// There is one per process.
fn backend() -> &'static LlamaBackend {
    static BACKEND: OnceLock<LlamaBackend> = OnceLock::new();
    BACKEND.get_or_init(|| {
        let mut backend = LlamaBackend::init().unwrap();
        backend.void_logs();
        backend
    })
}

fn load(model: &Model) -> LlamaModel {
    load_bytes(&model.to_bytes().unwrap()).unwrap()
}

fn load_bytes(bytes: &[u8]) -> Result<LlamaModel, llama_cpp_2::LlamaModelLoadError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    LlamaModel::load_from_file(backend(), &path, &LlamaModelParams::default())
}

fn context(model: &LlamaModel, embeddings: bool) -> LlamaContext<'_> {
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(512))
        .with_n_batch(512)
        .with_n_ubatch(512)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_embeddings(embeddings);
    model.new_context(backend(), params).unwrap()
}

#[test]
fn files_that_llama_cpp_refuses_are_refused() {
    let model = Model::new(Kind::Llama);
    let whole = model.to_bytes().unwrap();
    assert!(load_bytes(&whole).is_ok());
    for damage in [
        Damage::Truncated(whole.len() - 1),
        Damage::Truncated(100),
        Damage::Truncated(0),
        Damage::Magic,
        Damage::Version(1),
        Damage::Version(99),
        Damage::MissingKey("llama.context_length".to_owned()),
        Damage::MissingKey("tokenizer.ggml.merges".to_owned()),
        Damage::MissingTensor("blk.1.attn_q.weight".to_owned()),
    ] {
        let bytes = model.damaged(&damage).unwrap();
        assert!(load_bytes(&bytes).is_err(), "{damage:?}");
    }
}

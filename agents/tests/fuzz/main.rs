//! Files with damaged headers: whatever stands in one, the process goes on. Each file goes the whole way of a real one:
//! its header is read and checked, and what passes is loaded by llama.cpp and asked something.
//!
//! Where llama.cpp ends the process, the damage is left in `sarai-fuzz-KIND.txt` in the system's folder for temporary
//! files. `PROPTEST_CASES=100000 cargo test --release -p sarai-agents --test fuzz` looks longer.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use futures::StreamExt;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sarai_agents::llama::{GgufBackend, GgufSettings};
use sarai_core::backend::{Backend, LoadRequest};
use sarai_core::config::Context;
use sarai_core::request::{Capability, GenerateRequest, Sampling};
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// Files for each kind of model.
const CASES: u32 = 2_200;

/// A good file, damaged and mended again in place.
struct Subject {
    _folder: TempDir,
    path: PathBuf,
    header: Vec<u8>,
    purpose: Capability,
}

impl Subject {
    fn new(kind: Kind, purpose: Capability) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let model = Model::new(kind).n_embd(64).n_head(2).n_head_kv(2).n_layer(2).n_ff(64);
        let writer = model.dense(true).writer().unwrap();
        writer.create(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let header = whole.len() - usize::try_from(writer.tensor_bytes().unwrap()).unwrap();
        Self { _folder: folder, path, header: whole[..header].to_vec(), purpose }
    }

    fn write(&self, header: &[u8]) {
        let mut file = File::options().write(true).open(&self.path).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(header).unwrap();
    }

    /// Loads the file with some bytes changed, and asks it something where it can be loaded.
    async fn survives(&self, damage: &[(usize, u8)]) {
        let mut header = self.header.clone();
        for (at, byte) in damage {
            let at = at % header.len();
            header[at] = *byte;
        }
        self.write(&header);
        // Either outcome is a good one; what is not would end the process.
        let _outcome = self.use_it().await;
    }

    async fn use_it(&self) -> Result<(), sarai_core::failure::Failure> {
        let context = Context::Fixed(64);
        let settings = GgufSettings {
            context,
            threads: Some(1),
            parallel: Some(1),
            ..GgufSettings::new(&self.path, self.purpose)
        };
        let backend = GgufBackend::new(settings);
        let estimate = backend.estimate(Bytes::from_gb(1.0)).await?;
        if estimate.total() > Bytes::from_gb(1.0) {
            // The pool would not let it through.
            return Ok(());
        }
        let cancel = CancellationToken::new();
        let model = backend.load(LoadRequest { cancel, ..LoadRequest::new(estimate) }).await?;
        let asked = match self.purpose {
            Capability::Generate | Capability::See | Capability::Hear | Capability::Transcribe => {
                let sampling =
                    Sampling { max_tokens: Some(2), temperature: Some(0.0), ..Sampling::default() };
                let request = GenerateRequest::raw("the dog").with_sampling(sampling);
                match model.generate(request).await {
                    Ok(stream) => {
                        stream.collect::<Vec<_>>().await;
                        Ok(())
                    }
                    Err(failure) => Err(failure),
                }
            }
            Capability::Embed => model.embed(vec!["the dog".to_owned()]).await.map(drop),
            Capability::Classify => model.classify("the dog".to_owned()).await.map(drop),
            Capability::Rerank => model.rerank("dog".to_owned(), vec!["the dog".to_owned()]).await.map(drop),
        };
        model.unload().await;
        asked
    }
}

/// Damages a file of `kind` again and again. Small vocabularies fill most of a header, so that half of the damage is
/// aimed at what comes before and after them.
fn fuzz(name: &str, kind: Kind, purpose: Capability) {
    let subject = Subject::new(kind, purpose);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let note = std::env::temp_dir().join(format!("sarai-fuzz-{name}.txt"));
    let length = subject.header.len();
    let place = prop_oneof![2 => 0..1200_usize, 2 => length.saturating_sub(2400)..length, 3 => 0..length];
    let byte = prop_oneof![Just(0_u8), Just(1), Just(0x7f), Just(0x80), Just(0xff), any::<u8>()];
    let damage = prop::collection::vec((place, byte), 1..4);
    let config = Config { cases: cases(), failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let outcome = runner.run(&damage, |damage| {
        std::fs::write(&note, format!("{damage:?}")).unwrap();
        runtime.block_on(subject.survives(&damage));
        Ok(())
    });
    outcome.unwrap();
    std::fs::remove_file(note).unwrap();
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES)
}

fn labels() -> Vec<(String, Vec<String>)> {
    ["hard", "soft"].map(|label| (label.to_owned(), vec![format!("{label}word")])).into()
}

#[test]
fn a_damaged_llama_is_refused_or_works() {
    fuzz("llama", Kind::Llama, Capability::Generate);
}

#[test]
fn a_damaged_lfm2_is_refused_or_works() {
    fuzz("lfm2", Kind::Lfm2, Capability::Generate);
}

#[test]
fn a_damaged_qwen2vl_is_refused_or_works() {
    fuzz("qwen2vl", Kind::Qwen2Vl, Capability::Generate);
}

#[test]
fn a_damaged_bert_is_refused_or_works() {
    fuzz("bert", Kind::BertEmbedding, Capability::Embed);
}

#[test]
fn a_damaged_classifier_is_refused_or_works() {
    fuzz("classifier", Kind::BertClassifier { labels: labels() }, Capability::Classify);
}

#[test]
fn a_damaged_embedding_gemma_is_refused_or_works() {
    fuzz("gemma", Kind::GemmaEmbedding, Capability::Embed);
}

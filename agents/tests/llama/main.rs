//! The in-process engine on real GGUF files, made on the spot: a file per hazard.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod batching;
mod continued;
mod embedding;
mod files;
mod forms;
mod generation;
mod media;
mod memory;
mod sessions;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::StreamExt;
use sarai_agents::llama::{GgufBackend, GgufSettings};
use sarai_core::backend::{Backend, LoadRequest, Model as Loaded};
use sarai_core::config::Context;
use sarai_core::failure::Failure;
use sarai_core::request::{Capability, Completion, Delta, GenerateRequest, Message, Sampling, TokenStream};
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model};
use tempfile::TempDir;

/// A file of a model, in a folder that goes with it.
struct ModelFile {
    _folder: TempDir,
    path: PathBuf,
}

fn file(model: &Model) -> ModelFile {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    model.write_to(&path).unwrap();
    ModelFile { _folder: folder, path }
}

fn settings(path: &Path, purpose: Capability) -> GgufSettings {
    let context = Context::Fixed(512);
    GgufSettings { context, threads: Some(1), ..GgufSettings::new(path, purpose) }
}

async fn load(settings: GgufSettings) -> Result<Arc<dyn Loaded>, Failure> {
    let backend = GgufBackend::new(settings);
    let estimate = backend.estimate(Bytes::from_gb(4.0)).await?;
    backend.load(LoadRequest::new(estimate)).await
}

/// A loaded text model.
async fn llama(model: Model) -> (ModelFile, Arc<dyn Loaded>) {
    let file = file(&model);
    let loaded = load(settings(&file.path, Capability::Generate)).await.unwrap();
    (file, loaded)
}

fn chat(sampling: Sampling) -> GenerateRequest {
    GenerateRequest::chat(vec![Message::system("Be kind."), Message::user("¿Cómo estás?")])
        .with_sampling(sampling)
}

fn seeded(seed: u32) -> Sampling {
    Sampling { seed: Some(seed), max_tokens: Some(24), ..Sampling::default() }
}

async fn read(mut stream: TokenStream) -> Result<(String, Completion), Failure> {
    let mut text = String::new();
    loop {
        match stream.next().await.expect("a stream ends with Done or an error")? {
            Delta::Text(piece) => text += &piece,
            Delta::Done(completion) => {
                assert!(stream.next().await.is_none(), "nothing follows the end");
                return Ok((text, completion));
            }
        }
    }
}

async fn say(model: &Arc<dyn Loaded>, request: GenerateRequest) -> Result<(String, Completion), Failure> {
    read(model.generate(request).await?).await
}

/// How far the logarithm of a token's probability may be off where the same was computed in other steps: a step with more
/// tokens rounds otherwise. What belongs to another sequence or position is off by much more.
const ROUNDING: f32 = 0.15;

/// Asserts that two answers, asked for with `with_logprobs(2)`, are the same up to a call that is too close for rounding:
/// random weights make such calls.
fn assert_alike(expected: &Completion, found: &Completion, what: &str) {
    let tokens = |completion: &Completion| completion.logprobs.clone().expect("they were asked for");
    let (expected, found) = (tokens(expected), tokens(found));
    for (at, (expected, found)) in expected.iter().zip(&found).enumerate() {
        if expected.token != found.token {
            let lead = expected.top[0].logprob - expected.top[1].logprob;
            assert!(lead < 2.0 * ROUNDING, "{what}, token {at}: {expected:?} {found:?}");
            return;
        }
        let off = (expected.logprob - found.logprob).abs();
        assert!(off < ROUNDING, "{what}, token {at} is off by {off}: {expected:?} {found:?}");
    }
    assert_eq!(expected.len(), found.len(), "{what}");
}

fn kinds() -> [Kind; 2] {
    [Kind::Llama, Kind::Lfm2]
}

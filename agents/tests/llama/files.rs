use std::sync::{Arc, Mutex};

use sarai_agents::llama::{GgufBackend, GgufSettings};
use sarai_core::backend::{Backend, LoadRequest};
use sarai_core::failure::FailureKind;
use sarai_core::memory::Estimate;
use sarai_core::request::Capability;
use sarai_support::gguf::{Damage, Kind, Model, Projector};
use tokio_util::sync::CancellationToken;

use super::{chat, file, load, say, seeded, settings};

async fn failure_of(bytes: Option<&[u8]>) -> (FailureKind, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    if let Some(bytes) = bytes {
        std::fs::write(&path, bytes).unwrap();
    }
    // Straight to the load: what an earlier estimate found must not be relied on.
    let backend = GgufBackend::new(settings(&path, Capability::Generate));
    let estimate = Estimate { n_ctx: Some(64), ..Estimate::default() };
    let request = LoadRequest::new(estimate);
    let failure = backend.load(request).await.unwrap_err();
    assert_eq!(backend.estimate(sarai_core::units::Bytes(1)).await.unwrap_err().kind, failure.kind);
    let text = failure.to_string();
    assert!(text.contains(&path.display().to_string()), "{text}");
    (failure.kind, text)
}

#[tokio::test]
async fn files_that_are_no_models_are_refused_by_name() {
    assert_eq!(failure_of(None).await.0, FailureKind::FileMissing);
    let (kind, text) = failure_of(Some(b"just some notes")).await;
    assert_eq!(kind, FailureKind::BadFile);
    assert!(text.ends_with("is not a GGUF file: it starts with \"just\""), "{text}");
    let model = Model::new(Kind::Llama);
    let whole = model.to_bytes().unwrap();
    for damage in [
        Damage::Truncated(0),
        Damage::Truncated(100),
        Damage::Truncated(whole.len() / 2),
        Damage::Truncated(whole.len() - 1),
        Damage::Version(1),
        Damage::DuplicateToken,
        Damage::BlockCount(0),
        Damage::BlockCount(77),
        Damage::MissingKey("llama.context_length".to_owned()),
    ] {
        let (kind, text) = failure_of(Some(&model.damaged(&damage).unwrap())).await;
        assert_eq!(kind, FailureKind::BadFile, "{damage:?}: {text}");
    }
}

#[tokio::test]
async fn what_would_end_the_process_in_models_of_other_families_is_refused_by_name() {
    let sections = "qwen2vl.rope.dimension_sections";
    let feat_in = "gemma-embedding.dense_2_feat_in";
    for (model, damage, purpose, said) in [
        (Model::new(Kind::Qwen2Vl), Damage::Zeros(sections.into(), 4), Capability::Generate, sections),
        (
            Model::new(Kind::GemmaEmbedding).dense(true),
            Damage::Number(feat_in.into(), 128),
            Capability::Embed,
            "dense_2_feat_in",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, model.damaged(&damage).unwrap()).unwrap();
        let failure = load(settings(&path, purpose)).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadFile);
        assert!(failure.to_string().contains(said), "{failure}");
        // As it was it works.
        model.write_to(&path).unwrap();
        let loaded = load(settings(&path, purpose)).await.unwrap();
        match purpose {
            Capability::Embed => assert_eq!(loaded.embed(vec!["a".into()]).await.unwrap().vectors.len(), 1),
            _ => assert!(!say(&loaded, chat(seeded(1))).await.unwrap().0.is_empty()),
        }
    }
}

#[tokio::test]
async fn a_projector_is_checked_with_its_model() {
    let file = file(&Model::new(Kind::Qwen2Vl));
    let folder = tempfile::tempdir().unwrap();
    let mmproj = folder.path().join("mmproj.gguf");
    let with = || GgufSettings { mmproj: Some(mmproj.clone()), ..settings(&file.path, Capability::Generate) };
    assert_eq!(load(with()).await.unwrap_err().kind, FailureKind::FileMissing);
    Projector::new(192).write_to(&mmproj).unwrap();
    let model = load(with()).await.unwrap();
    assert!(!say(&model, chat(seeded(1))).await.unwrap().0.is_empty());
    for (damage, said) in [
        (Damage::MissingTensor("v.blk.1.attn_q.weight".into()), "v.blk.1.attn_q.weight"),
        (Damage::Shape("a.position_embd.weight".into(), vec![64, 750]), "a.position_embd.weight"),
    ] {
        std::fs::write(&mmproj, Projector::new(192).damaged(&damage).unwrap()).unwrap();
        let backend = GgufBackend::new(with());
        let refused = backend.estimate(sarai_core::units::Bytes(1)).await.unwrap_err();
        assert_eq!(refused.kind, FailureKind::BadFile);
        assert!(
            refused.to_string().contains(said) && refused.to_string().contains("mmproj.gguf"),
            "{refused}"
        );
        assert_eq!(load(with()).await.unwrap_err().kind, FailureKind::BadFile);
    }
    // One for another model.
    Projector::new(256).write_to(&mmproj).unwrap();
    let other = load(with()).await.unwrap_err();
    assert!(other.to_string().contains("clip.vision.projection_dim"), "{other}");
}

#[tokio::test]
async fn what_only_llama_cpp_can_see_is_its_error_and_not_its_end() {
    for damage in [
        Damage::MissingTensor("blk.1.attn_q.weight".into()),
        Damage::MissingKey("tokenizer.ggml.merges".into()),
    ] {
        let (kind, text) = match Model::new(Kind::Llama).damaged(&damage) {
            Ok(bytes) => {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("model.gguf");
                std::fs::write(&path, bytes).unwrap();
                let failure = load(settings(&path, Capability::Generate)).await.unwrap_err();
                (failure.kind, failure.to_string())
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(kind, FailureKind::BadFile);
        assert!(text.starts_with("llama.cpp could not load"), "{text}");
    }
}

#[tokio::test]
async fn a_load_tells_its_progress_up_to_the_end() {
    let file = file(&Model::new(Kind::Llama));
    let backend = GgufBackend::new(settings(&file.path, Capability::Generate));
    let heard = Arc::new(Mutex::new(Vec::new()));
    let progress = {
        let heard = Arc::clone(&heard);
        Arc::new(move |fraction| heard.lock().unwrap().push(fraction))
    };
    let estimate = backend.estimate(sarai_core::units::Bytes(1)).await.unwrap();
    backend.load(LoadRequest { progress, ..LoadRequest::new(estimate) }).await.unwrap();
    let heard = heard.lock().unwrap();
    assert!(heard.len() > 2 && heard.is_sorted() && heard.last() == Some(&1.0), "{heard:?}");
}

#[tokio::test]
async fn a_load_is_stopped_at_its_start_and_on_its_way() {
    let file = file(&Model::new(Kind::Llama));
    for stop_at in [0.0, 0.3] {
        let backend = GgufBackend::new(settings(&file.path, Capability::Generate));
        let cancel = CancellationToken::new();
        let stop = {
            let cancel = cancel.clone();
            Arc::new(move |fraction| {
                if fraction >= stop_at {
                    cancel.cancel()
                }
            })
        };
        let estimate = backend.estimate(sarai_core::units::Bytes(1)).await.unwrap();
        let failure = backend
            .load(LoadRequest { cancel, progress: stop, ..LoadRequest::new(estimate) })
            .await
            .unwrap_err();
        assert_eq!(failure.kind, FailureKind::Cancelled);
    }
}

#[tokio::test]
async fn a_load_that_waits_for_its_turn_hears_that_it_is_cancelled() {
    let file = file(&Model::new(Kind::Llama));
    let backend = GgufBackend::new(settings(&file.path, Capability::Generate));
    let estimate = backend.estimate(sarai_core::units::Bytes(1)).await.unwrap();
    let (begun, has_begun) = std::sync::mpsc::sync_channel(1);
    let (go_on, may_go_on) = std::sync::mpsc::sync_channel::<()>(1);
    let may_go_on = Mutex::new(may_go_on);
    // Stands still in its own progress report, so that its turn lasts.
    let slow = LoadRequest {
        progress: Arc::new(move |fraction| {
            // Reported more than once: the first time counts, then both channels are closed.
            if fraction == 0.0 && begun.send(()).is_ok() {
                may_go_on.lock().unwrap().recv().unwrap();
            }
        }),
        ..LoadRequest::new(estimate.clone())
    };
    let loading = tokio::spawn({
        let backend = GgufBackend::new(settings(&file.path, Capability::Generate));
        async move { backend.load(slow).await }
    });
    tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
    let cancel = CancellationToken::new();
    let request = LoadRequest { cancel: cancel.clone(), ..LoadRequest::new(estimate) };
    let waiting = tokio::spawn(async move { backend.load(request).await });
    cancel.cancel();
    assert_eq!(waiting.await.unwrap().unwrap_err().kind, FailureKind::Cancelled);
    go_on.send(()).unwrap();
    loading.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn helpers_and_llms_load_side_by_side() {
    let llm = file(&Model::new(Kind::Llama));
    let helper = file(&Model::new(Kind::GemmaEmbedding));
    for _ in 0..20 {
        let (llm, helper) = tokio::join!(
            load(settings(&llm.path, Capability::Generate)),
            load(settings(&helper.path, Capability::Embed)),
        );
        let (llm, helper) = (llm.unwrap(), helper.unwrap());
        let (text, vectors) = tokio::join!(say(&llm, chat(seeded(1))), helper.embed(vec!["a".to_owned()]));
        assert!(!text.unwrap().0.is_empty());
        assert_eq!(vectors.unwrap().vectors.len(), 1);
        tokio::join!(llm.unload(), helper.unload());
    }
}

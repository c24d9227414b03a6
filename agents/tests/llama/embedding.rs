use std::time::Duration;

use sarai_core::config::Context;
use sarai_core::failure::FailureKind;
use sarai_core::request::Capability;
use sarai_support::gguf::{Kind, Model};

use super::{file, load, settings};

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

#[tokio::test]
async fn vectors_have_length_one_keep_their_order_and_are_close_for_like_texts() {
    for kind in [Kind::BertEmbedding, Kind::GemmaEmbedding, Kind::Llama] {
        let file = file(&Model::new(kind.clone()));
        let model = load(settings(&file.path, Capability::Embed)).await.unwrap();
        let all =
            texts(&["fix the bug in my program", "rain or snow tonight", "there is a bug in this program"]);
        let embedded = model.embed(all.clone()).await.unwrap();
        assert!(embedded.prompt_tokens.unwrap() > 8);
        for (text, vector) in all.iter().zip(&embedded.vectors) {
            assert!((dot(vector, vector) - 1.0).abs() < 1e-4, "{kind:?}");
            let alone = model.embed(vec![text.clone()]).await.unwrap();
            assert!(dot(&alone.vectors[0], vector) > 0.9999, "{kind:?} {text}");
        }
        if kind != Kind::Llama {
            let [bug, rain, other_bug] = &embedded.vectors[..] else { panic!("three vectors") };
            assert!(dot(bug, other_bug) > dot(bug, rain) + 0.2, "{kind:?}");
        }
    }
}

#[tokio::test]
async fn a_text_longer_than_the_context_is_refused_and_named() {
    let file = file(&Model::new(Kind::BertEmbedding));
    let model = load(settings(&file.path, Capability::Embed)).await.unwrap();
    let long = "bug ".repeat(600);
    let failure = model.embed(texts(&["short", &long])).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::ContextOverflow);
    assert!(failure.to_string().starts_with("text 1 has "), "{failure}");
}

#[tokio::test]
async fn a_text_longer_than_a_context_that_llama_cpp_rounds_up_is_refused_too() {
    for kind in [Kind::BertEmbedding, Kind::GemmaEmbedding, Kind::Llama] {
        let file = file(&Model::new(kind.clone()));
        let mut settings = settings(&file.path, Capability::Embed);
        settings.context = Context::Fixed(300);
        let model = load(settings).await.unwrap();
        // Longer than 300 tokens, and for the first ones shorter than the 512 that llama.cpp makes of it.
        for words in [310, 350, 400, 450, 600] {
            let failure = model.embed(texts(&["bug ".repeat(words).as_str()])).await.unwrap_err();
            assert_eq!(failure.kind, FailureKind::ContextOverflow, "{kind:?} {words}");
        }
        // Several that fit, each alone, but not all together.
        let all: Vec<String> =
            (0..5).map(|n| format!("{} {}", "bug ".repeat(90), "dog ".repeat(n))).collect();
        let together = model.embed(all.clone()).await.unwrap().vectors;
        for (text, vector) in all.into_iter().zip(together) {
            let alone = model.embed(vec![text]).await.unwrap().vectors;
            let cosine: f32 = alone[0].iter().zip(&vector).map(|(a, b)| a * b).sum();
            assert!(cosine > 0.999, "{kind:?} {cosine}");
        }
    }
}

#[tokio::test]
async fn a_short_text_does_not_wait_for_the_end_of_a_long_list() {
    let file = file(&Model::new(Kind::BertEmbedding));
    let model = load(settings(&file.path, Capability::Embed)).await.unwrap();
    let mut list = model.embed(vec!["bug ".repeat(500); 300]);
    assert!(futures::future::poll_immediate(&mut list).await.is_none());
    tokio::select! {
        biased;
        _ = &mut list => panic!("the list was read first"),
        short = model.embed(texts(&["bug"])) => assert_eq!(short.unwrap().vectors.len(), 1),
    }
    assert_eq!(list.await.unwrap().vectors.len(), 300);
}

#[tokio::test]
async fn texts_that_nobody_waits_for_any_more_keep_nobody_waiting() {
    let file = file(&Model::new(Kind::BertEmbedding));
    let model = load(settings(&file.path, Capability::Embed)).await.unwrap();
    for _ in 0..20 {
        // Given up after its first texts.
        let mut list = model.embed(vec!["bug ".repeat(500); 1000]);
        tokio::select! {
            biased;
            _ = &mut list => panic!("the list was read first"),
            short = model.embed(texts(&["bug"])) => assert_eq!(short.unwrap().vectors.len(), 1),
        }
    }
    let after = tokio::time::timeout(Duration::from_secs(60), model.embed(texts(&["bug"])));
    assert_eq!(after.await.unwrap().unwrap().vectors.len(), 1);
}

#[tokio::test]
async fn an_encoder_is_unloaded_in_the_middle_of_its_work() {
    let file = file(&Model::new(Kind::BertEmbedding));
    let model = load(settings(&file.path, Capability::Embed)).await.unwrap();
    let list = model.embed(vec!["bug ".repeat(500); 1000]);
    let unloaded = async {
        // It works by now: what came after the list is answered.
        model.embed(texts(&["bug"])).await.unwrap();
        tokio::time::timeout(Duration::from_secs(60), model.unload()).await.unwrap();
    };
    let (read, ()) = tokio::join!(list, unloaded);
    assert_eq!(read.unwrap_err().kind, FailureKind::EngineGone);
    assert_eq!(model.embed(texts(&["bug"])).await.unwrap_err().kind, FailureKind::EngineGone);
}

#[tokio::test]
async fn a_classifier_gives_probabilities_highest_first() {
    let labels =
        [("hard", ["theorem", "code"]), ("soft", ["hello", "thanks"]), ("multimodal", ["picture", "photo"])];
    let labels = labels.map(|(label, words)| (label.to_owned(), texts(&words))).to_vec();
    let file = file(&Model::new(Kind::BertClassifier { labels }));
    let model = load(settings(&file.path, Capability::Classify)).await.unwrap();
    for (text, label) in
        [("prove the theorem", "hard"), ("hello and thanks", "soft"), ("see my photo", "multimodal")]
    {
        let scores = model.classify(text.to_owned()).await.unwrap();
        assert_eq!(scores[0].label, label);
        assert!((scores.iter().map(|score| score.score).sum::<f32>() - 1.0).abs() < 1e-5);
        assert!(scores.is_sorted_by(|a, b| a.score >= b.score));
    }
}

#[tokio::test]
async fn a_model_asked_for_what_it_cannot_do_says_so() {
    let file = file(&Model::new(Kind::BertEmbedding));
    let failure = load(settings(&file.path, Capability::Generate)).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::BadFile);
    let failure = load(settings(&file.path, Capability::Classify)).await.unwrap_err();
    assert!(failure.to_string().contains("names no labels"), "{failure}");
}

#[tokio::test]
async fn texts_of_many_requests_share_steps_and_come_out_as_if_alone() {
    for kind in [Kind::BertEmbedding, Kind::GemmaEmbedding, Kind::Llama, Kind::Lfm2] {
        let file = file(&Model::new(kind.clone()));
        let model = load(settings(&file.path, Capability::Embed)).await.unwrap();
        let words = ["bug", "rain", "program", "snow", "tonight"];
        let text = |n: usize| [words[n % 5]; 40][..1 + n * 7 % 40].join(" ");
        let mut alone = Vec::new();
        for n in 0..40 {
            alone.push(model.embed(vec![text(n)]).await.unwrap().vectors.remove(0));
        }
        let requests = (0..8).map(|request| model.embed((0..5).map(|n| text(request * 5 + n)).collect()));
        let together = futures::future::join_all(requests).await;
        let together: Vec<Vec<f32>> =
            together.into_iter().flat_map(|answer| answer.unwrap().vectors).collect();
        for (n, (alone, together)) in alone.iter().zip(&together).enumerate() {
            assert!(dot(alone, together) > 0.9999, "{kind:?} {n}: {}", dot(alone, together));
        }
        assert_eq!(model.embed(Vec::new()).await.unwrap().vectors, Vec::<Vec<f32>>::new());
    }
}

#[tokio::test]
async fn a_reranker_scores_documents_in_their_order() {
    let kind = Kind::BertClassifier { labels: vec![("relevant".into(), vec!["rust".into()])] };
    let file = file(&Model::new(kind));
    let model = load(settings(&file.path, Capability::Rerank)).await.unwrap();
    let documents = texts(&["rain and snow", "all about rust", "a cat"]);
    let scores = model.rerank("which language?".into(), documents).await.unwrap();
    assert_eq!(scores.len(), 3);
    assert!(scores.iter().all(|score| (0.0..=1.0).contains(score)), "{scores:?}");
    assert!(scores[1] > scores[0] && scores[1] > scores[2], "{scores:?}");
    let failure = model.rerank("rust ".repeat(600), texts(&["x"])).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::ContextOverflow);
    // Asked for what it was not loaded for.
    assert_eq!(model.embed(texts(&["x"])).await.unwrap_err().kind, FailureKind::Unsupported);
}

#[tokio::test]
async fn a_model_without_a_head_or_with_several_labels_is_no_reranker() {
    let several = [("hard", "x"), ("soft", "y")].map(|(label, word)| (label.into(), vec![word.into()]));
    for kind in [Kind::BertEmbedding, Kind::Llama, Kind::BertClassifier { labels: several.into() }] {
        let file = file(&Model::new(kind));
        let failure = load(settings(&file.path, Capability::Rerank)).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadFile);
    }
}

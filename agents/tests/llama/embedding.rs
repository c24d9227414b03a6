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
        model.embed(texts(&["bug"])).await.unwrap();
    }
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

//! Routing of many utterances. What a real embedding model makes of them, `scripts/test --live` measures.

use std::collections::{BTreeMap, BTreeSet};

use sarai_core::answer::CallOptions;
use sarai_core::config::{RouterConfig, RouterKind, RouterRule};
use sarai_core::router::Router;
use sarai_core::testing::{FakeModels, Script};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Utterance {
    text: String,
    labels: BTreeSet<String>,
}

fn utterances() -> Vec<Utterance> {
    serde_yaml::from_str(include_str!("../../../tests/utterances/utterances.yaml")).unwrap()
}

#[test]
fn there_are_enough_of_each_kind_in_both_languages_and_none_twice() {
    let all = utterances();
    assert!(all.len() >= 60, "{}", all.len());
    let texts: BTreeSet<&str> = all.iter().map(|one| one.text.as_str()).collect();
    assert_eq!(texts.len(), all.len());
    for label in ["hard", "soft", "multimodal"] {
        assert!(all.iter().filter(|one| one.labels.contains(label)).count() >= 15, "{label}");
    }
    assert!(
        all.iter().all(|one| one
            .labels
            .iter()
            .all(|label| ["hard", "soft", "multimodal"].contains(&label.as_str())))
    );
    assert!(all.iter().filter(|one| one.labels.len() > 1).count() >= 10);
    let spanish = all.iter().filter(|one| one.text.contains(['¿', 'ñ', 'á', 'é', 'í', 'ó', 'ú'])).count();
    assert!((15..all.len() - 15).contains(&spanish), "{spanish}");
}

/// Words that stand for a label; a vector counts them.
const WORDS: [(&str, &[&str]); 3] = [
    ("hard", &["Explain", "Explica", "explain", "explica"]),
    ("soft", &["Hello", "Hola", "worried", "scared", "agobia"]),
    ("multimodal", &["photo", "foto", "imagen", "picture", "image"]),
];

#[tokio::test]
async fn an_utterance_scores_high_for_each_of_its_labels_and_a_rule_takes_them_together() {
    let words: Vec<String> =
        WORDS.iter().flat_map(|(_, words)| words.iter().map(|&word| word.to_owned())).collect();
    let labels =
        WORDS.map(|(label, words)| (label.to_owned(), words.iter().map(|&word| word.to_owned()).collect()));
    let rule = |when: &str, model: &str| RouterRule { when: when.to_owned(), model: model.parse().unwrap() };
    let router = Router::new(RouterConfig {
        kind: RouterKind::Similarity { model: "e".parse().unwrap(), labels: BTreeMap::from(labels) },
        rules: vec![
            rule("multimodal > 0.5 and hard > 0.5", "both"),
            rule("hard > 0.5 and soft > 0.5", "gentle"),
        ],
        routes: WORDS.map(|(label, _)| (label.to_owned(), label.parse().unwrap())).into(),
        default: None,
        threshold: 0.5,
    });
    let models = FakeModels::default().with("e", Script::CountsWords(words));
    let mut seen = BTreeMap::<String, usize>::new();
    for Utterance { text, labels } in utterances() {
        let said: BTreeSet<&str> = WORDS
            .iter()
            .filter(|(_, words)| words.iter().any(|word| text.contains(word)))
            .map(|(label, _)| *label)
            .collect();
        // Where its words tell all of its labels.
        if said.len() != labels.len() || !labels.iter().all(|label| said.contains(label.as_str())) {
            continue;
        }
        let routing = router.route(&text, &models, CallOptions::default()).await.unwrap();
        let high: BTreeSet<String> = routing
            .scores
            .iter()
            .filter(|score| score.score > 0.5)
            .map(|score| score.label.clone())
            .collect();
        assert_eq!(high, labels, "{text}: {}", routing.reason);
        *seen.entry(routing.model.unwrap().to_string()).or_default() += 1;
    }
    assert_eq!(
        seen.keys().map(String::as_str).collect::<Vec<_>>(),
        ["both", "gentle", "hard", "multimodal", "soft"],
        "{seen:?}"
    );
}

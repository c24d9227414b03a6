//! How often a router of your own is right: SARAI_ROUTER_CONFIG names a configuration whose router knows the labels hard, soft
//! and multimodal.

use std::collections::{BTreeMap, BTreeSet};

use sarai::{CallOptions, Sarai};
use serde::Deserialize;

/// The least part of the utterances whose winning label has to be one of theirs.
const ENOUGH: f64 = 0.8;

#[derive(Debug, Deserialize)]
struct Utterance {
    text: String,
    labels: BTreeSet<String>,
}

#[tokio::test]
#[ignore = "needs SARAI_ROUTER_CONFIG"]
async fn four_of_five_utterances_get_a_label_of_theirs() {
    let config = std::env::var_os("SARAI_ROUTER_CONFIG").expect("SARAI_ROUTER_CONFIG names a configuration");
    let sarai = Sarai::from_file(config).await.unwrap();
    let router = sarai.router().expect("the configuration has a router");
    let utterances: Vec<Utterance> =
        serde_yaml::from_str(include_str!("../utterances/utterances.yaml")).unwrap();
    let known: BTreeSet<String> = utterances.iter().flat_map(|one| one.labels.clone()).collect();
    // What each kind of utterance was taken for.
    let mut taken = BTreeMap::<(String, String), usize>::new();
    let mut right = 0;
    for Utterance { text, labels } in &utterances {
        let routing = router.route(text, sarai.pool(), CallOptions::default()).await.unwrap();
        let scored: BTreeSet<String> = routing.scores.iter().map(|score| score.label.clone()).collect();
        assert!(
            scored.is_superset(&known),
            "the router's labels are {scored:?}, and have to include {known:?}"
        );
        let won = &routing.scores[0].label;
        right += usize::from(labels.contains(won));
        if !labels.contains(won) {
            eprintln!("{won} instead of {labels:?}: {text} ({})", routing.reason);
        }
        let labels = labels.iter().map(String::as_str).collect::<Vec<_>>().join("+");
        *taken.entry((labels, won.clone())).or_default() += 1;
    }
    for ((labels, won), count) in &taken {
        eprintln!("{labels:>16} taken for {won:<10} {count:3}");
    }
    let accuracy = right as f64 / utterances.len() as f64;
    eprintln!("{right} of {} utterances: {accuracy:.3}", utterances.len());
    assert!(accuracy >= ENOUGH, "{accuracy:.3} is less than {ENOUGH}");
}

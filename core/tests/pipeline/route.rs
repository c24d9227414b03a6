use std::collections::BTreeMap;

use futures::future::join_all;
use sarai_core::answer::CallOptions;
use sarai_core::config::{RouterConfig, RouterKind, RouterRule};
use sarai_core::request::LabelScore;
use sarai_core::router::{Router, Routing};
use sarai_core::testing::{FakeModels, Script};

fn similarity() -> RouterConfig {
    let labels = [("hard", ["prove theorem", "theorem"]), ("soft", ["hello", "hello friend"])];
    let labels = labels.map(|(label, texts)| (label.to_owned(), texts.map(str::to_owned).to_vec()));
    RouterConfig {
        kind: RouterKind::Similarity { model: "e".parse().unwrap(), labels: BTreeMap::from(labels) },
        rules: Vec::new(),
        routes: BTreeMap::from([("hard".to_owned(), "solar".parse().unwrap())]),
        default: Some("lfm2".parse().unwrap()),
        threshold: 0.5,
    }
}

fn models() -> FakeModels {
    let words = ["theorem", "prove", "hello", "friend"].map(str::to_owned).to_vec();
    let scores =
        [("soft", 0.3), ("hard", 0.7)].map(|(label, score)| LabelScore { label: label.to_owned(), score });
    FakeModels::default().with("e", Script::CountsWords(words)).with("c", Script::Scores(scores.to_vec()))
}

async fn route(config: RouterConfig, text: &str) -> Routing {
    Router::new(config).route(text, &models(), CallOptions::default()).await.unwrap()
}

#[tokio::test]
async fn a_text_goes_where_its_likeliest_example_goes_and_the_reason_says_so() {
    let routing = route(similarity(), "a theorem").await;
    assert_eq!(routing.label.as_deref(), Some("hard"));
    assert_eq!(routing.reason, "hard 1.00 above soft 0.00; hard goes to solar");
    assert_eq!(routing.scores[0].score, 1.0);
    let json = serde_json::to_value(&routing).unwrap();
    assert_eq!((&json["model"], &json["served_by"]), (&"solar".into(), &"gguf_native:e.gguf".into()));
}

#[tokio::test]
async fn a_label_without_a_route_and_a_text_like_nothing_take_the_default() {
    let routing = route(similarity(), "hello").await;
    assert_eq!((routing.label.as_deref(), routing.model.unwrap().as_str()), (Some("soft"), "lfm2"));
    let routing = route(similarity(), "weather").await;
    assert_eq!((routing.label, routing.model.unwrap().as_str()), (None, "lfm2"));
    assert_eq!(routing.reason, "hard 0.00 is below the threshold of 0.50; the default is lfm2");
}

#[tokio::test]
async fn without_a_default_there_may_be_no_model() {
    let routing = route(RouterConfig { default: None, ..similarity() }, "weather").await;
    assert_eq!(routing.model, None);
    assert!(routing.reason.ends_with("no route and no default gives a model"));
}

#[tokio::test]
async fn a_classifiers_scores_decide_highest_first() {
    let kind = RouterKind::Classifier { model: "c".parse().unwrap() };
    let routing = route(RouterConfig { kind, ..similarity() }, "anything").await;
    assert_eq!(routing.label.as_deref(), Some("hard"));
    assert_eq!(routing.scores.iter().map(|score| score.label.as_str()).collect::<Vec<_>>(), ["hard", "soft"]);
}

#[tokio::test]
async fn the_examples_are_embedded_once_for_all_who_ask() {
    let (router, models) = (Router::new(similarity()), models());
    let routings = join_all((0..5).map(|_| router.route("a theorem", &models, CallOptions::default()))).await;
    assert!(routings.into_iter().all(|routing| routing.unwrap().label.as_deref() == Some("hard")));
    let examples = models.asked().iter().filter(|(_, texts)| texts.contains("prove theorem")).count();
    assert_eq!((examples, models.asked().len()), (1, 5));
}

#[tokio::test]
async fn after_a_fallback_to_another_model_the_examples_are_embedded_by_that_one() {
    let (router, models) = (Router::new(similarity()), models());
    let route = async || router.route("a theorem", &models, CallOptions::default()).await.unwrap();
    assert_eq!(route().await.label.as_deref(), Some("hard"));
    models.move_on();
    for _ in 0..2 {
        let routing = route().await;
        assert_eq!(routing.label.as_deref(), Some("hard"), "{routing:?}");
        assert_eq!(routing.provenance.served_by.to_string(), "gguf_native:e-elsewhere.gguf");
    }
    let examples = models.asked().iter().filter(|(_, texts)| texts.contains("prove theorem")).count();
    assert_eq!(examples, 2);
}

#[tokio::test]
async fn a_failure_to_embed_the_examples_is_not_kept() {
    let router = Router::new(similarity());
    let broken = FakeModels::default().with("e", Script::Fails);
    assert!(router.route("a theorem", &broken, CallOptions::default()).await.is_err());
    assert!(router.route("a theorem", &models(), CallOptions::default()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_rule_over_several_labels_goes_before_the_label_that_wins() {
    let score = |(label, score): (&str, f32)| LabelScore { label: label.to_owned(), score };
    let scores = [("hard", 0.8), ("soft", 0.7), ("multimodal", 0.1)].map(score).to_vec();
    let rule = |when: &str, model: &str| RouterRule { when: when.to_owned(), model: model.parse().unwrap() };
    let with = |rules: Vec<RouterRule>| {
        Router::new(RouterConfig {
            kind: RouterKind::Classifier { model: "c".parse().unwrap() },
            rules,
            routes: [("hard".to_owned(), "solar".parse().unwrap())].into(),
            default: None,
            threshold: 0.5,
        })
    };
    let models = FakeModels::default().with("c", Script::Scores(scores));
    let rules = vec![rule("multimodal > 0.6", "omni"), rule("hard > 0.5 and soft > 0.5", "lfm2")];
    let routing = with(rules).route("x", &models, CallOptions::default()).await.unwrap();
    assert_eq!((routing.model.as_ref().unwrap().as_str(), routing.label.as_deref()), ("lfm2", Some("hard")));
    assert_eq!(routing.rule.as_deref(), Some("hard > 0.5 and soft > 0.5"));
    assert_eq!(
        routing.reason,
        "hard 0.80, soft 0.70, multimodal 0.10; `hard > 0.5 and soft > 0.5` goes to lfm2"
    );
    let none = with(vec![rule("multimodal > 0.6", "omni")])
        .route("x", &models, CallOptions::default())
        .await
        .unwrap();
    assert_eq!((none.model.unwrap().as_str(), none.rule), ("solar", None));
    // A classifier's labels are known only when it has scored.
    let error = with(vec![rule("musical > 0.6", "omni")])
        .route("x", &models, CallOptions::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("the rule `musical > 0.6`: undefined value"), "{error}");
}

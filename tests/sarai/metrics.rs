//! Every metric the pool registers is described, and moves.

use futures::StreamExt;
use metrics_exporter_prometheus::PrometheusBuilder;
use sarai::core::config::{Env, Overrides};
use sarai::{CallOptions, GenerateRequest, Message, Sarai};

use super::{Site, nobody};

#[test]
fn loads_fallbacks_tokens_and_bytes_are_counted_under_their_models() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let site = Site::new();
            let env = Env::new(
                [("OLLAMA_BASE_URL".to_owned(), nobody())].into(),
                std::collections::BTreeMap::new(),
            );
            let path = site.path("config/site.yaml");
            let config = sarai::core::config::load(&path, &env, &Overrides::default()).unwrap().config;
            let sarai = Sarai::start(&config).unwrap();
            let request = GenerateRequest::chat(vec![Message::user("hola")]);
            let solar = sarai.pool().handle("solar").unwrap();
            let answer = solar.generate(request, CallOptions::default()).await.unwrap();
            answer.for_each(|event| async { drop(event.unwrap()) }).await;
            sarai.pool().unload("solar").await.unwrap();
            sarai.pool().shutdown(std::time::Duration::from_secs(5)).await;
        });
    });
    let text = handle.render();
    let has = |name: &str, labels: &[&str]| {
        text.lines().any(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
    };
    assert!(
        has(
            "sarai_fallbacks_total",
            &["model=\"solar\"", "from=\"ollama_http:lan\"", "reason=\"unreachable\""]
        ),
        "{text}"
    );
    assert!(has("sarai_loads_total", &["model=\"solar\"", "solar.gguf", "outcome=\"ok\"", " 1"]), "{text}");
    assert!(has("sarai_unloads_total", &["reason=\"asked\"", " 1"]), "{text}");
    assert!(has("sarai_load_seconds", &["solar.gguf"]), "{text}");
    assert!(has("sarai_model_bytes", &["kind=\"anonymous\""]), "{text}");
    assert!(has("sarai_used_bytes 0", &[]), "{text}");
    assert!(has("sarai_answers_total", &["outcome=\"ok\"", " 1"]), "{text}");
    assert!(has("sarai_queue_depth 0", &[]), "{text}");
}

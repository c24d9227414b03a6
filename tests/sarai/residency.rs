//! The pool with real models, several at once.

use std::sync::Arc;

use futures::StreamExt;
use sarai::core::config::{Config, Env, Overrides, Resolved};
use sarai::core::scheduler::Phase;
use sarai::core::units::Bytes;
use sarai::{AnswerEvent, CallOptions, Error, GenerateRequest, Message, PoolEvent, Sampling, Sarai};
use sarai_support::gguf::{Kind, Model};

use super::{Site, nobody};

fn config(site: &Site, more: &str, overrides: &Overrides) -> Config {
    let variables = [("OLLAMA_BASE_URL".to_owned(), nobody())];
    let env = Env::new(variables.into(), std::collections::BTreeMap::new());
    // By cost, who leaves depends on how long loads took, which a busy machine decides.
    let memory = format!("{more}\nmemory:\n  eviction: lru");
    let text = include_str!("site.yaml").replace("\nmemory:", &memory);
    let path = site.path("config/site.yaml");
    let Resolved { config, .. } = sarai::core::config::parse(&text, Some(&path), &env, overrides).unwrap();
    config
}

fn request() -> GenerateRequest {
    let sampling = Sampling { max_tokens: Some(8), seed: Some(1), ..Sampling::default() };
    GenerateRequest::chat(vec![Message::user("hola")]).with_sampling(sampling)
}

async fn ask(sarai: &Sarai, model: &str) -> Result<String, Error> {
    let mut stream = sarai.pool().handle(model)?.generate(request(), CallOptions::default()).await?;
    let mut text = String::new();
    while let Some(event) = stream.next().await {
        if let AnswerEvent::Text(piece) = event? {
            text += &piece;
        }
    }
    Ok(text)
}

async fn ready(sarai: &Sarai) -> Vec<String> {
    let usage = sarai.pool().memory_usage().await.unwrap();
    assert!(usage.used_bytes <= usage.budget_bytes && usage.peak_bytes <= usage.budget_bytes);
    let mut names: Vec<String> = usage
        .models
        .iter()
        .filter(|model| model.state == "ready")
        .map(|model| model.model.to_string())
        .collect();
    names.dedup();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn three_llms_and_two_helpers_are_there_at_once_and_a_fourth_takes_the_oldest_ones_place() {
    let site = Site::new();
    site.model("fourth", &Model::new(Kind::Llama).seed(9));
    let more = "\n  fourth:\n    backend: gguf_native\n    path: ../models/demo/fourth.gguf\n";
    let sarai = Sarai::start(&config(&site, more, &Overrides::default())).unwrap();
    for (model, result) in sarai.pool().load_residents().await {
        result.unwrap_or_else(|error| panic!("{model}: {error}"));
    }
    for model in ["omni", "solar", "lfm2"] {
        assert!(!ask(&sarai, model).await.unwrap().is_empty());
    }
    assert_eq!(ready(&sarai).await, ["embedding", "lfm2", "omni", "router", "solar"]);
    let usage = sarai.pool().memory_usage().await.unwrap();
    assert_eq!((usage.llms, usage.max_concurrent_llms), (3, 3));
    for model in usage.models.iter().filter(|model| model.state == "ready") {
        if !model.served_by.to_string().starts_with("gguf") {
            continue;
        }
        // Other tests run in this process: whose memory is whose can be told for the file alone.
        let estimated = model.estimated_bytes.unwrap();
        assert_eq!(model.measured.is_some(), cfg!(target_os = "linux"));
        if let Some(measured) = model.measured {
            assert!(measured.file_backed > Bytes(500_000) && measured.file_backed <= estimated, "{model:?}");
        }
    }
    ask(&sarai, "fourth").await.unwrap();
    assert_eq!(ready(&sarai).await, ["embedding", "fourth", "lfm2", "router", "solar"]);
    sarai.pool().shutdown(std::time::Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_all_three_busy_a_fourth_waits_and_then_runs() {
    let site = Site::new();
    for name in ["omni", "lfm2", "solar"] {
        site.model(name, &Model::new(Kind::Llama).endless(true));
    }
    site.model("fourth", &Model::new(Kind::Llama).seed(9));
    let more = "\n  fourth:\n    backend: gguf_native\n    path: ../models/demo/fourth.gguf\n";
    let sarai = Sarai::start(&config(&site, more, &Overrides::default())).unwrap();
    let mut leases = Vec::new();
    for model in ["omni", "solar", "lfm2"] {
        leases.push(sarai.pool().handle(model).unwrap().lease().await.unwrap());
    }
    let mut events = sarai.pool().events();
    let waiting = {
        let sarai = sarai.clone();
        tokio::spawn(async move { ask(&sarai, "fourth").await })
    };
    loop {
        match events.next().await.unwrap() {
            PoolEvent::Slot(change) if change.model.as_str() == "fourth" && change.to == Phase::Waiting => {
                break;
            }
            PoolEvent::Slot(change) => assert_ne!(change.to, Phase::Unloading, "{change:?}"),
            _ => {}
        }
    }
    assert!(!waiting.is_finished());
    drop(leases.remove(0));
    assert!(!waiting.await.unwrap().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn five_models_in_a_row_under_a_budget_for_two_never_exceed_it_at_any_event() {
    let site = Site::new();
    let mut more = String::new();
    for (seed, name) in (1..).zip(["m1", "m2", "m3", "m4", "m5"]) {
        site.model(name, &Model::new(Kind::Llama).seed(seed));
        more += &format!("\n  {name}:\n    backend: gguf_native\n    path: ../models/demo/{name}.gguf\n");
    }
    let one = Sarai::start(&config(&site, &more, &Overrides::default())).unwrap();
    let size = one.pool().plan(&["m1"]).await.unwrap()[0].estimate.as_ref().unwrap().total();
    let budget = Overrides { max_ram_gb: Some(size.as_gb() * 2.5), ..Overrides::default() };
    let sarai = Arc::new(Sarai::start(&config(&site, &more, &budget)).unwrap());
    let mut events = sarai.pool().events();
    for name in ["m1", "m2", "m3", "m4", "m5", "m1"] {
        ask(&sarai, name).await.unwrap();
    }
    sarai.pool().shutdown(std::time::Duration::from_secs(5)).await;
    drop(sarai);
    let (mut loads, mut unloads) = (0, 0);
    while let Some(event) = events.next().await {
        let PoolEvent::Slot(change) = event else { continue };
        assert!(change.used <= change.budget, "{change:?}");
        loads += usize::from(change.to == Phase::Ready);
        unloads += usize::from(change.from == Phase::Unloading);
    }
    assert_eq!((loads, unloads), (6, 6));
}

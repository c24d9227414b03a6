//! What a host has to do, asked of a real one: `scripts/test --live` with OLLAMA_BASE_URL set, or OPENAI_BASE_URL for a server of
//! OpenAI's protocol (llama-server, vLLM, LiteLLM). SOLAR_MODEL_NAME or OPENAI_MODEL name the model; else the first that the
//! host has is taken. No part of the usual tests: these need no network.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
#![expect(clippy::print_stderr, reason = "a transcript is what a person runs this for")]

mod router;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sarai_agents::remote::{HostApi, RemoteBackend};
use sarai_agents::{ollama, openai};
use sarai_core::backend::{Backend, LoadRequest, Model};
use sarai_core::config::{HostConfig, HostKind};
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::Estimate;
use sarai_core::request::{
    Capability, Completion, Constraint, Delta, FinishReason, GenerateRequest, Message, Prefill, Sampling,
};
use sarai_core::units::ApiKey;
use serde_json::{Value, json};

/// A live host and a model of it.
struct Live {
    api: Arc<dyn HostApi>,
    model: String,
    kind: HostKind,
}

/// The hosts that are named; at least one has to be.
async fn hosts() -> Vec<Live> {
    let named = [
        (HostKind::Ollama, "OLLAMA_BASE_URL", "SOLAR_MODEL_NAME"),
        (HostKind::Openai, "OPENAI_BASE_URL", "OPENAI_MODEL"),
    ];
    let mut hosts = Vec::new();
    for (kind, url, model) in named {
        let Ok(url) = std::env::var(url) else { continue };
        let api = client(kind, url.trim_end_matches('/').trim_end_matches("/v1"));
        let model = match std::env::var(model) {
            Ok(model) => model,
            Err(_) => api.has().await.unwrap().first().expect("the host has a model").clone(),
        };
        eprintln!("{} with {model}", api.served_by());
        hosts.push(Live { api, model, kind });
    }
    assert!(!hosts.is_empty(), "set OLLAMA_BASE_URL or OPENAI_BASE_URL");
    hosts
}

fn client(kind: HostKind, url: &str) -> Arc<dyn HostApi> {
    let long = Duration::from_secs(300);
    let config = HostConfig {
        kind,
        url: url.to_owned(),
        api_key: std::env::var("OPENAI_API_KEY").ok().map(ApiKey::new),
        max_ram: None,
        watch_interval: None,
        connect_timeout: Duration::from_secs(5),
        first_token_timeout: long,
        load_timeout: long,
        stall_timeout: long,
        total_timeout: long * 2,
        retries: 0,
        parallel: 4,
        keep_alive: long,
        continues: true,
    };
    let name = "live".parse().unwrap();
    match kind {
        HostKind::Ollama => Arc::new(ollama::Client::new(name, &config).unwrap()),
        HostKind::Openai => Arc::new(openai::Client::new(name, &config).unwrap()),
    }
}

impl Live {
    async fn model(&self, name: &str) -> Arc<dyn Model> {
        let hosts = [(Arc::clone(&self.api), name.to_owned())];
        let backend = RemoteBackend::new(hosts, None, Capability::Generate);
        backend.load(LoadRequest::new(Estimate::default())).await.unwrap()
    }

    async fn ask(&self, request: GenerateRequest) -> Result<(String, Completion), Failure> {
        let mut stream = self.model(&self.model).await.generate(request).await?;
        let mut text = String::new();
        loop {
            match stream.next().await.expect("a stream ends with Done or an error")? {
                Delta::Text(piece) => text += &piece,
                Delta::Done(completion) => {
                    eprintln!("{}: {text:?} {completion:?}", self.api.served_by());
                    return Ok((text, completion));
                }
            }
        }
    }
}

fn question(text: &str, max_tokens: u32) -> GenerateRequest {
    let sampling = Sampling { max_tokens: Some(max_tokens), temperature: Some(0.0), ..Sampling::default() };
    GenerateRequest::chat(vec![Message::system("Be brief."), Message::user(text)]).with_sampling(sampling)
}

#[tokio::test]
async fn an_answer_comes_in_pieces_with_its_counts() {
    for host in hosts().await {
        let (text, completion) = host.ask(question("Say hello.", 16)).await.unwrap();
        assert!(!text.is_empty());
        assert!(completion.prompt_tokens.is_some_and(|tokens| tokens > 0));
        assert!(completion.completion_tokens.is_some_and(|tokens| (1..=16).contains(&tokens)));
    }
}

#[tokio::test]
async fn the_limit_of_tokens_ends_an_answer() {
    for host in hosts().await {
        let (_, completion) = host.ask(question("Count from one to one hundred in words.", 3)).await.unwrap();
        assert_eq!(completion.finish_reason, FinishReason::Length);
        assert!(completion.completion_tokens.is_some_and(|tokens| tokens <= 3));
    }
}

#[tokio::test]
async fn the_same_seed_and_no_randomness_give_the_same_answer() {
    for host in hosts().await {
        let ask = || host.ask(question("Name a colour.", 8));
        assert_eq!(ask().await.unwrap().0, ask().await.unwrap().0);
    }
}

#[tokio::test]
async fn an_answer_under_a_schema_is_json_of_that_form() {
    let schema = json!({
        "type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"],
        "additionalProperties": false
    });
    for host in hosts().await {
        let request = question("Is water wet?", 1000).with_constraint(Constraint::JsonSchema(schema.clone()));
        let (text, _) = host.ask(request).await.unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(["yes", "no"].contains(&value["answer"].as_str().unwrap()));
    }
}

#[tokio::test]
async fn a_begun_answer_is_gone_on_with_and_not_said_again() {
    for host in hosts().await {
        let prefill = Prefill { text: "The first three numbers are one, two,".to_owned(), tokens: 9 };
        let (text, _) =
            host.ask(question("Say the first three numbers.", 24).with_prefill(prefill)).await.unwrap();
        assert!(!text.starts_with("The first three"), "{text}");
    }
}

#[tokio::test]
async fn a_model_that_is_not_there_is_told_as_such() {
    for host in hosts().await {
        let model = host.model("no-such-model-here:1b").await;
        match model.generate(question("Hi", 1)).await.map(drop) {
            Err(failure) => {
                eprintln!("{failure}");
                assert!(
                    matches!(failure.kind, FailureKind::ModelMissing | FailureKind::Refused),
                    "{failure:?}"
                );
            }
            // A server of one model takes any name for it.
            Ok(()) => assert_eq!(host.kind, HostKind::Openai),
        }
    }
}

#[tokio::test]
async fn a_dropped_stream_leaves_the_host_ready_for_the_next_request() {
    for host in hosts().await {
        let model = host.model(&host.model).await;
        let mut stream = model.generate(question("Tell a very long story.", 4000)).await.unwrap();
        assert!(matches!(stream.next().await, Some(Ok(Delta::Text(_)))));
        drop(stream);
        host.ask(question("Say hello.", 4)).await.unwrap();
    }
}

#[tokio::test]
async fn many_requests_at_once_are_all_answered() {
    for host in hosts().await {
        let asks = (0..8).map(|n| host.ask(question(&format!("Say {n}."), 4)));
        assert!(futures::future::join_all(asks).await.into_iter().all(|answer| answer.is_ok()));
    }
}

#[tokio::test]
async fn an_ollama_lists_and_unloads_what_it_holds() {
    for host in hosts().await.into_iter().filter(|host| host.kind == HostKind::Ollama) {
        host.ask(question("Say hello.", 2)).await.unwrap();
        assert_eq!(host.api.resident(&host.model), Some(true));
        assert!(host.api.unload(&host.model).await.unwrap(), "and it is confirmed");
    }
}

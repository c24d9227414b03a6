use std::sync::Arc;
use std::time::Duration;

use sarai_agents::ollama::Client;
use sarai_agents::remote::{HostApi, RemoteBackend};
use sarai_core::backend::{Backend, LoadRequest};
use sarai_core::config::HostConfig;
use sarai_core::failure::FailureKind;
use sarai_core::memory::Estimate;
use sarai_core::request::{Capability, Constraint, GenerateRequest, Message, Sampling, Tool, ToolCall};
use sarai_core::units::Bytes;
use sarai_support::host::{Behaviour, Host};
use serde_json::json;

use super::{ask, config, hello, ollama};

#[tokio::test]
async fn a_chat_is_asked_for_with_every_setting_said_and_none_made_up() {
    let host = Host::start().await.unwrap();
    let sampling = Sampling {
        temperature: Some(0.5),
        max_tokens: Some(9),
        seed: Some(3),
        stop: vec!["\n".into()],
        ..Sampling::default()
    };
    let messages = vec![Message::system("Be brief."), Message::user("Hi")];
    ask(&*ollama(&config(&host.url())), &GenerateRequest::chat(messages).with_sampling(sampling))
        .await
        .1
        .unwrap();
    let request = host.requests().pop().unwrap();
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/api/chat"));
    assert_eq!(
        request.body,
        json!({
            "model": "solar:10.7b",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "stream": true, "think": false, "truncate": false, "shift": false, "keep_alive": 300,
            "options": {"num_ctx": 4096, "num_predict": 9, "temperature": 0.5, "seed": 3, "stop": ["\n"]}
        })
    );
}

#[tokio::test]
async fn tools_their_calls_and_a_schema_are_said_as_the_host_expects_them() {
    let host = Host::start().await.unwrap();
    let tool =
        Tool { name: "weather".into(), description: "now".into(), parameters: json!({"type": "object"}) };
    let call = ToolCall { name: "weather".into(), arguments: serde_json::Map::new() };
    let messages = vec![
        Message::user("Hi"),
        Message::assistant("").with_tool_calls(vec![call]),
        Message::tool("weather", "sunny"),
    ];
    let request = GenerateRequest::chat(messages).with_tools(vec![tool]);
    ask(&*ollama(&config(&host.url())), &request).await.1.unwrap();
    let body = host.requests().pop().unwrap().body;
    assert_eq!(
        body["tools"],
        json!([{"type": "function", "function": {"name": "weather", "description": "now", "parameters": {"type": "object"}}}])
    );
    assert_eq!(
        body["messages"][1]["tool_calls"],
        json!([{"function": {"name": "weather", "arguments": {}}}])
    );
    assert_eq!(body["messages"][2], json!({"role": "tool", "content": "sunny", "tool_name": "weather"}));

    let schema = json!({"type": "object"});
    let constrained =
        |constraint| GenerateRequest::chat(vec![Message::user("Hi")]).with_constraint(constraint);
    ask(&*ollama(&config(&host.url())), &constrained(Constraint::JsonSchema(schema.clone())))
        .await
        .1
        .unwrap();
    assert_eq!(host.requests().pop().unwrap().body["format"], schema);
    let sent = host.requests().len();
    let refused = [
        constrained(Constraint::Grammar("root ::= \"a\"".into())),
        request.with_constraint(Constraint::JsonSchema(schema)),
    ];
    for request in refused {
        assert_eq!(
            ask(&*ollama(&config(&host.url())), &request).await.1.unwrap_err().kind,
            FailureKind::BadRequest
        );
    }
    assert_eq!(host.requests().len(), sent);
}

#[tokio::test]
async fn a_request_without_a_prompt_is_refused_before_it_is_taken_for_a_load() {
    let host = Host::start().await.unwrap();
    for request in [GenerateRequest::raw(""), GenerateRequest::chat(vec![])] {
        let failure = ask(&*ollama(&config(&host.url())), &request).await.1.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadRequest);
    }
    assert!(host.requests().is_empty());
}

#[tokio::test]
async fn a_keep_alive_below_a_second_does_not_become_an_unload() {
    let host = Host::start().await.unwrap();
    let short = HostConfig { keep_alive: Duration::from_millis(1), ..config(&host.url()) };
    ask(&*ollama(&short), &hello()).await.1.unwrap();
    assert_eq!(host.requests()[0].body["keep_alive"], 1);
}

#[tokio::test]
async fn a_raw_prompt_goes_past_the_hosts_template() {
    let host = Host::start().await.unwrap();
    ask(&*ollama(&config(&host.url())), &GenerateRequest::raw("Once")).await.1.unwrap();
    let request = host.requests().pop().unwrap();
    assert_eq!(
        (request.path.as_str(), &request.body["prompt"], &request.body["raw"]),
        ("/api/generate", &json!("Once"), &json!(true))
    );
}

#[tokio::test]
async fn a_host_that_knows_nothing_of_thinking_is_asked_without_it() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::NoThinking);
    ask(&*ollama(&config(&host.url())), &hello()).await.1.unwrap();
    let thinks: Vec<_> = host.requests().iter().map(|request| request.body["think"].clone()).collect();
    assert_eq!(thinks, [json!(false), json!(null)]);
}

#[tokio::test]
async fn embeddings_come_in_order_with_length_one() {
    let host = Host::start().await.unwrap();
    let embedded = ollama(&config(&host.url())).embed("m", None, &["a".into(), "b".into()]).await.unwrap();
    assert_eq!(embedded.vectors, [[0.6, 0.8, 0.0], [0.6, 0.8, 0.0]]);
    assert_eq!(host.requests()[0].body["truncate"], json!(false));
}

#[tokio::test]
async fn a_model_is_loaded_listed_and_unloaded_and_nothing_else_is_ever_sent() {
    let host = Host::start().await.unwrap();
    let client = ollama(&config(&host.url()));
    assert_eq!(client.version().await.unwrap(), "0.32.15");
    client.preload("solar", Some(2048)).await.unwrap();
    let listed = client.ps().await.unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].context_length), ("solar:latest", Some(4096)));
    client.unload("solar").await.unwrap();
    client.unload("solar").await.unwrap();
    assert!(host.loaded().is_empty());
    ask(&*client, &hello()).await.1.unwrap();
    client.embed("m", None, &["a".into()]).await.unwrap();
    let allowed =
        ["GET /api/version", "GET /api/ps", "POST /api/generate", "POST /api/chat", "POST /api/embed"];
    for request in host.requests() {
        let line = format!("{} {}", request.method, request.path);
        assert!(allowed.contains(&line.as_str()), "{line}");
        assert!(
            request.body["keep_alive"].is_null() || request.body["keep_alive"].is_u64(),
            "{:?}",
            request.body
        );
    }
}

#[tokio::test]
async fn a_host_never_gets_more_at_once_than_its_limit() {
    let host = Host::start().await.unwrap();
    let client = ollama(&HostConfig { parallel: 3, ..config(&host.url()) });
    let request = hello();
    let backend =
        RemoteBackend::new([(client as Arc<dyn HostApi>, "m".to_owned())], None, Capability::Generate);
    let model = backend.load(LoadRequest::new(Estimate::default())).await.unwrap();
    let answers =
        futures::future::join_all((0..100).map(|_| super::ask_model(&*model, request.clone()))).await;
    assert!(answers.iter().all(|(text, end)| end.is_ok() && text.ends_with("😀")));
    assert_eq!(host.requests().len(), 100);
    assert!((1..=3).contains(&host.most_at_once()), "{}", host.most_at_once());
}

#[tokio::test]
async fn a_backend_takes_no_memory_and_frees_the_hosts_when_asked() {
    let host = Host::start().await.unwrap();
    let api: Arc<dyn HostApi> = ollama(&config(&host.url()));
    let backend = RemoteBackend::new([(api, "solar".to_owned())], None, Capability::Generate);
    assert_eq!(backend.served_by().to_string(), "ollama_http:lan");
    let estimate = backend.estimate(Bytes(1)).await.unwrap();
    assert_eq!(estimate.total(), Bytes::ZERO);
    let model = backend.load(LoadRequest::new(Estimate::default())).await.unwrap();
    assert!(host.requests().is_empty(), "a load asks the host for nothing");
    let embedding = model.embed(vec!["a".into()]).await.unwrap();
    assert_eq!(embedding.vectors.len(), 1);
    assert_eq!(host.loaded(), ["solar:latest"]);
    let freed = backend.unload_on_hosts().await.unwrap();
    assert_eq!(freed.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ollama_http:lan"]);
    assert!(host.loaded().is_empty());
}

#[tokio::test]
async fn a_model_that_a_host_does_not_have_is_told_with_what_it_has_and_how_to_get_it() {
    let host = Host::start().await.unwrap();
    host.has("llama3.2:3b", 2_000_000_000);
    host.behave(Behaviour::NoModel);
    let api: Arc<dyn HostApi> = ollama(&config(&host.url()));
    let backend = RemoteBackend::new([(api, "solar:10.7b".to_owned())], None, Capability::Generate);
    let model = backend.load(LoadRequest::new(Estimate::default())).await.unwrap();
    let failure = super::ask_model(&*model, hello()).await.1.unwrap_err();
    assert_eq!(failure.kind, FailureKind::ModelMissing);
    let message = failure.to_string();
    assert!(message.contains("it has llama3.2:3b; `ollama pull solar:10.7b`"), "{message}");
}

#[test]
fn an_address_that_is_none_is_refused_when_the_client_is_made() {
    for url in ["ftp://host", "nonsense", "http://"] {
        let config = HostConfig { url: url.into(), connect_timeout: Duration::from_secs(1), ..config(url) };
        let error = Client::new("lan".parse().unwrap(), &config).unwrap_err().to_string();
        assert!(error.starts_with("host lan: bad url: "), "{error}");
    }
}

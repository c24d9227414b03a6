use std::sync::Arc;
use std::time::Duration;

use sarai_agents::ollama::{Client, OllamaBackend};
use sarai_core::backend::{Backend, LoadRequest};
use sarai_core::config::HostConfig;
use sarai_core::failure::FailureKind;
use sarai_core::memory::Estimate;
use sarai_core::request::{Capability, Constraint, GenerateRequest, Message, Sampling, Tool, ToolCall};
use sarai_core::units::Bytes;
use sarai_support::host::{Behaviour, Host};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{SHORT, ask, client, client_with, config, hello};

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
    ask(&client(&host), &GenerateRequest::chat(messages).with_sampling(sampling)).await.1.unwrap();
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
    ask(&client(&host), &request).await.1.unwrap();
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
    ask(&client(&host), &constrained(Constraint::JsonSchema(schema.clone()))).await.1.unwrap();
    assert_eq!(host.requests().pop().unwrap().body["format"], schema);
    let sent = host.requests().len();
    let refused = [
        constrained(Constraint::Grammar("root ::= \"a\"".into())),
        request.with_constraint(Constraint::JsonSchema(schema)),
    ];
    for request in refused {
        assert_eq!(ask(&client(&host), &request).await.1.unwrap_err().kind, FailureKind::BadRequest);
    }
    assert_eq!(host.requests().len(), sent);
}

#[tokio::test]
async fn a_request_without_a_prompt_is_refused_before_it_is_taken_for_a_load() {
    let host = Host::start().await.unwrap();
    for request in [GenerateRequest::raw(""), GenerateRequest::chat(vec![])] {
        let failure = ask(&client(&host), &request).await.1.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadRequest);
    }
    assert!(host.requests().is_empty());
}

#[tokio::test]
async fn a_keep_alive_below_a_second_does_not_become_an_unload() {
    let host = Host::start().await.unwrap();
    let short = HostConfig { keep_alive: Duration::from_millis(1), ..config(&host.url()) };
    ask(&client_with(&short), &hello()).await.1.unwrap();
    assert_eq!(host.requests()[0].body["keep_alive"], 1);
}

#[tokio::test]
async fn a_raw_prompt_goes_past_the_hosts_template() {
    let host = Host::start().await.unwrap();
    ask(&client(&host), &GenerateRequest::raw("Once")).await.1.unwrap();
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
    ask(&client(&host), &hello()).await.1.unwrap();
    let thinks: Vec<_> = host.requests().iter().map(|request| request.body["think"].clone()).collect();
    assert_eq!(thinks, [json!(false), json!(null)]);
}

#[tokio::test]
async fn embeddings_come_in_order_with_length_one() {
    let host = Host::start().await.unwrap();
    let embedded = client(&host).embed("m", None, &["a".into(), "b".into()]).await.unwrap();
    assert_eq!(embedded.vectors, [[0.6, 0.8, 0.0], [0.6, 0.8, 0.0]]);
    assert_eq!(host.requests()[0].body["truncate"], json!(false));
}

#[tokio::test]
async fn a_model_is_loaded_listed_and_unloaded_and_nothing_else_is_ever_sent() {
    let host = Host::start().await.unwrap();
    let client = client(&host);
    assert_eq!(client.version().await.unwrap(), "0.32.15");
    client.preload("solar", Some(2048)).await.unwrap();
    let listed = client.ps().await.unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].context_length), ("solar:latest", Some(4096)));
    client.unload("solar").await.unwrap();
    client.unload("solar").await.unwrap();
    assert!(host.loaded().is_empty());
    ask(&client, &hello()).await.1.unwrap();
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
    let client = client_with(&HostConfig { parallel: 3, ..config(&host.url()) });
    let request = hello();
    let answers = futures::future::join_all((0..100).map(|_| ask(&client, &request))).await;
    assert!(answers.iter().all(|(text, end)| end.is_ok() && text.ends_with("😀")));
    assert_eq!(host.requests().len(), 100);
    assert!((1..=3).contains(&host.most_at_once()), "{}", host.most_at_once());
}

#[tokio::test]
async fn waiting_for_the_hosts_limit_ends_at_the_deadline_as_busy() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::StallAfter(1));
    let client = client_with(&HostConfig { parallel: 2, first_token_timeout: SHORT, ..config(&host.url()) });
    let _running = [
        client.generate("m", None, &hello()).await.unwrap(),
        client.generate("m", None, &hello()).await.unwrap(),
    ];
    let (_, end) = ask(&client, &hello()).await;
    assert_eq!(end.unwrap_err().kind, FailureKind::Busy);
}

#[tokio::test]
async fn a_backend_takes_no_memory_and_frees_the_hosts_when_asked() {
    let host = Host::start().await.unwrap();
    let backend = OllamaBackend {
        client: client(&host),
        model: "solar".into(),
        n_ctx: None,
        purpose: Capability::Generate,
    };
    assert_eq!(backend.served_by().to_string(), "ollama_http:lan");
    let estimate = backend.estimate(Bytes(1)).await.unwrap();
    assert_eq!(estimate.total(), Bytes::ZERO);
    let request = LoadRequest {
        estimate: Estimate::default(),
        cancel: CancellationToken::new(),
        progress: Arc::new(|_| {}),
    };
    let model = backend.load(request).await.unwrap();
    assert!(host.requests().is_empty(), "a load asks the host for nothing");
    let embedding = model.embed(vec!["a".into()]).await.unwrap();
    assert_eq!(embedding.vectors.len(), 1);
    assert_eq!(host.loaded(), ["solar:latest"]);
    assert!(backend.unload_on_host().await.unwrap());
    assert!(host.loaded().is_empty());
}

#[test]
fn an_address_that_is_none_is_refused_when_the_client_is_made() {
    for url in ["ftp://host", "nonsense", "http://"] {
        let config = HostConfig { url: url.into(), connect_timeout: Duration::from_secs(1), ..config(url) };
        let error = Client::new("lan".parse().unwrap(), &config).unwrap_err().to_string();
        assert!(error.starts_with("host lan: bad url: "), "{error}");
    }
}

use sarai_core::config::{HostConfig, HostKind};
use sarai_core::failure::FailureKind;
use sarai_core::image::Image;
use sarai_core::request::{Constraint, FinishReason, GenerateRequest, Message, Sampling, Tool, ToolCall};
use sarai_core::units::ApiKey;
use sarai_support::host::{Behaviour, Host};
use serde_json::json;

use super::{KINDS, ask, client, client_with, config, hello};

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
    let request = GenerateRequest::chat(messages).with_sampling(sampling);
    let (text, end) = ask(&*client(HostKind::Openai, &host), &request).await;
    let completion = end.unwrap();
    assert_eq!(text, "hola desde el host ñ😀");
    let counts = (completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens);
    assert_eq!(counts, (Some(7), Some(3), Some(4)));
    let request = host.requests().pop().unwrap();
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/v1/chat/completions"));
    assert_eq!(
        request.body,
        json!({
            "model": "solar:10.7b",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "stream": true, "stream_options": {"include_usage": true},
            "max_tokens": 9, "temperature": 0.5, "seed": 3, "stop": ["\n"]
        })
    );
}

#[tokio::test]
async fn tools_are_called_on_hosts_of_both_kinds() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::Calls);
        let tool =
            Tool { name: "weather".into(), description: "now".into(), parameters: json!({"type": "object"}) };
        let call = ToolCall { name: "weather".into(), arguments: serde_json::Map::new() };
        let messages = vec![
            Message::user("Hi"),
            Message::assistant("").with_tool_calls(vec![call]),
            Message::tool("weather", "sunny"),
            Message::user("And in Madrid?"),
        ];
        let request = GenerateRequest::chat(messages).with_tools(vec![tool]);
        let completion = ask(&*client(of, &host), &request).await.1.unwrap();
        assert_eq!(completion.finish_reason, FinishReason::ToolCalls);
        let [call] = completion.tool_calls.as_slice() else { panic!("one call") };
        assert_eq!((call.name.as_str(), &call.arguments["city"]), ("weather", &json!("Madrid")));
        let body = host.requests().pop().unwrap().body;
        if of == HostKind::Openai {
            assert_eq!(body["messages"][1]["tool_calls"][0]["id"], body["messages"][2]["tool_call_id"]);
            assert_eq!(body["messages"][1]["tool_calls"][0]["function"]["arguments"], "{}");
        }
    }
}

#[tokio::test]
async fn images_are_sent_as_each_protocol_takes_them() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        let image = Image::new(&b"\xff\xd8\xff\xe0"[..]).unwrap();
        let message = Message::user("What is this?").with_images(vec![image]);
        ask(&*client(of, &host), &GenerateRequest::chat(vec![message])).await.1.unwrap();
        let message = &host.requests()[0].body["messages"][0];
        match of {
            HostKind::Ollama => assert_eq!(message["images"], json!(["/9j/4A=="])),
            HostKind::Openai => {
                assert_eq!(message["content"][0]["image_url"]["url"], "data:image/jpeg;base64,/9j/4A==");
                assert_eq!(message["content"][1]["text"], "What is this?");
            }
        }
    }
}

#[tokio::test]
async fn a_schema_is_said_and_a_grammar_refused() {
    let host = Host::start().await.unwrap();
    let client = client(HostKind::Openai, &host);
    let schema = json!({"type": "object"});
    let request = hello().with_constraint(Constraint::JsonSchema(schema.clone()));
    ask(&*client, &request).await.1.unwrap();
    assert_eq!(host.requests().pop().unwrap().body["response_format"]["json_schema"]["schema"], schema);
    let request = hello().with_constraint(Constraint::Grammar("root ::= \"a\"".into()));
    assert_eq!(ask(&*client, &request).await.1.unwrap_err().kind, FailureKind::BadRequest);
}

#[tokio::test]
async fn a_key_is_sent_and_never_shown() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        let key = Some(ApiKey::new("sk-very-secret".to_owned()));
        let config = HostConfig { api_key: key, ..config(&host.url()) };
        let client = client_with(of, &config);
        ask(&*client, &hello()).await.1.unwrap();
        assert_eq!(host.requests()[0].authorization.as_deref(), Some("Bearer sk-very-secret"));
        host.behave(Behaviour::Status(401, "{\"error\": \"bad key\"}".into()));
        let failure = ask(&*client, &hello()).await.1.unwrap_err();
        assert_eq!(failure.kind, FailureKind::Denied);
        let shown = format!("{failure} {failure:?} {client:?} {config:?}");
        assert!(!shown.contains("secret"), "{shown}");
    }
}

#[tokio::test]
async fn embeddings_come_in_the_texts_order_however_the_host_sends_them() {
    let host = Host::start().await.unwrap();
    let client = client(HostKind::Openai, &host);
    let embedded = client.embed("m", None, &["a".into(), "b".into()]).await.unwrap();
    assert_eq!(embedded.vectors, [[0.6, 0.8, 0.0], [0.6, 0.8, 0.0]]);
    assert_eq!(embedded.prompt_tokens, Some(4));
    assert_eq!(host.requests()[0].path, "/v1/embeddings");
}

#[tokio::test]
async fn a_raw_prompt_goes_to_the_completions() {
    let host = Host::start().await.unwrap();
    let (text, _) = ask(&*client(HostKind::Openai, &host), &GenerateRequest::raw("Once")).await;
    assert_eq!(text, "hola desde el host ñ😀");
    let request = host.requests().pop().unwrap();
    assert_eq!((request.path.as_str(), &request.body["prompt"]), ("/v1/completions", &json!("Once")));
}

#[tokio::test]
async fn what_it_has_is_listed_and_nothing_is_unloaded() {
    let host = Host::start().await.unwrap();
    host.has("solar", 1);
    let client = client(HostKind::Openai, &host);
    assert_eq!(client.has().await.unwrap(), ["solar:latest"]);
    assert!(!client.unload("solar").await.unwrap());
    let paths: Vec<String> = host.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths, ["/v1/models"]);
}

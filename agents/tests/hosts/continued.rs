use std::sync::Arc;

use sarai_agents::remote::RemoteBackend;
use sarai_core::backend::{Backend, LoadRequest, Model};
use sarai_core::config::{HostConfig, HostKind};
use sarai_core::failure::FailureKind;
use sarai_core::memory::Estimate;
use sarai_core::request::{
    Capability, Constraint, FinishReason, GenerateRequest, Message, Prefill, Sampling,
};
use sarai_support::host::Host;
use serde_json::json;

use super::{KINDS, ask_model, client_with, config, hello};

const WHOLE: &str = "hola desde el host ñ😀";

async fn model(of: HostKind, config: &HostConfig) -> Arc<dyn Model> {
    let hosts = [(client_with(of, config), "solar".to_owned())];
    let backend = RemoteBackend::new(hosts, None, Capability::Generate);
    backend.load(LoadRequest::new(Estimate::default())).await.unwrap()
}

fn said(text: &str) -> Prefill {
    Prefill { text: text.to_owned(), tokens: 2 }
}

#[tokio::test]
async fn an_answer_is_gone_on_with_wherever_it_was_cut() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        let model = model(of, &config(&host.url())).await;
        for end in (0..=WHOLE.len()).filter(|end| WHOLE.is_char_boundary(*end)) {
            for request in [hello(), GenerateRequest::raw("Say: ")] {
                let (text, done) = ask_model(&*model, request.with_prefill(said(&WHOLE[..end]))).await;
                assert_eq!(format!("{}{text}", &WHOLE[..end]), WHOLE);
                done.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn the_beginning_is_the_last_message_and_its_tokens_count_for_the_limit() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        let model = model(of, &config(&host.url())).await;
        let sampling = Sampling { max_tokens: Some(9), ..Sampling::default() };
        let request = GenerateRequest::chat(vec![Message::user("Hi")]).with_sampling(sampling);
        ask_model(&*model, request.with_prefill(said("hola "))).await.1.unwrap();
        let body = host.requests().pop().unwrap().body;
        assert_eq!(body["messages"][1], json!({"role": "assistant", "content": "hola "}));
        let limit =
            if of == HostKind::Ollama { &body["options"]["num_predict"] } else { &body["max_tokens"] };
        assert_eq!(limit, &json!(7));
    }
}

#[tokio::test]
async fn a_stop_text_that_began_before_is_found_on_the_next_host() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        let model = model(of, &config(&host.url())).await;
        let sampling = Sampling { stop: vec!["desde el".to_owned()], ..Sampling::default() };
        let request = hello().with_sampling(sampling).with_prefill(said("hola des"));
        let (text, done) = ask_model(&*model, request).await;
        assert_eq!((text.as_str(), done.unwrap().finish_reason), ("", FinishReason::Stop));
    }
}

#[tokio::test]
async fn a_form_cannot_be_gone_on_with_on_a_host() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        let model = model(of, &config(&host.url())).await;
        let request = hello().with_constraint(Constraint::JsonSchema(json!({}))).with_prefill(said("{"));
        assert_eq!(ask_model(&*model, request).await.1.unwrap_err().kind, FailureKind::BadRequest);
        assert!(host.requests().is_empty());
    }
}

#[tokio::test]
async fn a_host_of_the_open_protocol_goes_on_only_where_that_is_known() {
    let host = Host::start().await.unwrap();
    let config = HostConfig { continues: false, ..config(&host.url()) };
    let model = model(HostKind::Openai, &config).await;
    let failure = ask_model(&*model, hello().with_prefill(said("hola "))).await.1.unwrap_err();
    assert_eq!(failure.kind, FailureKind::BadRequest);
    assert!(failure.to_string().contains("`continues:`"), "{failure}");
    assert!(host.requests().is_empty());
}

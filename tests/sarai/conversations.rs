//! Conversations that outlive the pool they were held in.

use std::time::Duration;

use futures::StreamExt;
use sarai::core::config::{self, Env, Overrides};
use sarai::{Answer, AnswerEvent, CallOptions, GenerateRequest, Message, Sampling, Sarai};

use super::Site;

fn start(site: &Site) -> Sarai {
    let text = format!(
        "models:\n  lfm2: {{backend: gguf_native, path: models/demo/lfm2.gguf, context: 1024}}\nsessions: {{path: '{}'}}\n",
        site.path("kept").display()
    );
    let path = site.path("sarai.yaml");
    let resolved = config::parse(&text, Some(&path), &Env::default(), &Overrides::default()).unwrap();
    Sarai::start(&resolved.config).unwrap()
}

async fn ask(sarai: &Sarai, messages: &[Message]) -> (String, Answer) {
    let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(12), ..Sampling::default() };
    let request = GenerateRequest::chat(messages.to_vec()).with_sampling(sampling);
    let handle = sarai.pool().handle("lfm2").unwrap();
    let mut stream = handle.generate(request, CallOptions::default()).await.unwrap();
    let mut text = String::new();
    loop {
        match stream.next().await.unwrap().unwrap() {
            AnswerEvent::Text(piece) => text += &piece,
            AnswerEvent::Done(answer) => return (text, answer),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_goes_on_in_the_next_pool_after_a_shutdown_in_order() {
    let site = Site::new();
    let mut messages =
        vec![Message::system("the dog and the cat are here and now ".repeat(15)), Message::user("hola")];
    let sarai = start(&site);
    let (said, first) = ask(&sarai, &messages).await;
    sarai.pool().shutdown(Duration::from_secs(10)).await;
    messages.extend([Message::assistant(said), Message::user("¿y mañana?")]);
    let sarai = start(&site);
    let (_, second) = ask(&sarai, &messages).await;
    assert_eq!(first.cached_tokens, Some(0));
    assert!(second.cached_tokens.unwrap() + 1 >= first.prompt_tokens.unwrap(), "{second:?}");
    sarai.pool().shutdown(Duration::from_secs(10)).await;
}

//! Models on hosts, against a host that does what the test says, down to the bytes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod choice;
mod continued;
mod faults;
mod media;
mod memory;
mod openai;
mod requests;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sarai_agents::remote::HostApi;
use sarai_agents::{ollama, openai as openai_host};
use sarai_core::backend::Model;
use sarai_core::config::{HostConfig, HostKind};
use sarai_core::failure::Failure;
use sarai_core::request::{Completion, Delta, GenerateRequest, Message, TokenStream};
use sarai_support::host::Host;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(100);

/// Both protocols: whatever a host speaks, it fails in the same ways.
const KINDS: [HostKind; 2] = [HostKind::Ollama, HostKind::Openai];

fn config(url: &str) -> HostConfig {
    HostConfig {
        kind: HostKind::Ollama,
        url: url.to_owned(),
        api_key: None,
        max_ram: None,
        watch_interval: None,
        connect_timeout: Duration::from_secs(2),
        first_token_timeout: LONG,
        load_timeout: Duration::ZERO,
        stall_timeout: LONG,
        total_timeout: LONG,
        retries: 0,
        parallel: 4,
        keep_alive: Duration::from_secs(300),
        continues: true,
    }
}

fn ollama(config: &HostConfig) -> Arc<ollama::Client> {
    Arc::new(ollama::Client::new("lan".parse().unwrap(), config).unwrap())
}

fn client_with(kind: HostKind, config: &HostConfig) -> Arc<dyn HostApi> {
    named("lan", kind, config)
}

fn named(name: &str, kind: HostKind, config: &HostConfig) -> Arc<dyn HostApi> {
    let name = name.parse().unwrap();
    match kind {
        HostKind::Ollama => Arc::new(ollama::Client::new(name, config).unwrap()),
        HostKind::Openai => Arc::new(openai_host::Client::new(name, config).unwrap()),
    }
}

fn client(kind: HostKind, host: &Host) -> Arc<dyn HostApi> {
    client_with(kind, &config(&host.url()))
}

fn hello() -> GenerateRequest {
    GenerateRequest::chat(vec![Message::user("hello")])
}

/// The text up to the end, and the end.
async fn ask(client: &dyn HostApi, request: &GenerateRequest) -> (String, Result<Completion, Failure>) {
    match client.generate("solar:10.7b", Some(4096), request).await {
        Ok(deltas) => read(Box::pin(deltas.map(|delta| delta.map_err(Failure::from)))).await,
        Err(error) => (String::new(), Err(error.into())),
    }
}

async fn ask_model(model: &dyn Model, request: GenerateRequest) -> (String, Result<Completion, Failure>) {
    match model.generate(request).await {
        Ok(stream) => read(stream).await,
        Err(failure) => (String::new(), Err(failure)),
    }
}

async fn read(mut stream: TokenStream) -> (String, Result<Completion, Failure>) {
    let mut text = String::new();
    loop {
        match stream.next().await.expect("a stream ends with Done or an error") {
            Ok(Delta::Text(piece)) => text += &piece,
            Ok(Delta::Done(completion)) => return (text, Ok(completion)),
            Err(failure) => return (text, Err(failure)),
        }
    }
}

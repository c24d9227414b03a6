//! The Ollama client against a host that does what the test says, down to the bytes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod faults;
mod requests;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sarai_agents::ollama::Client;
use sarai_core::config::HostConfig;
use sarai_core::failure::Failure;
use sarai_core::request::{Completion, Delta, GenerateRequest, Message};
use sarai_support::host::Host;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(100);

fn config(url: &str) -> HostConfig {
    HostConfig {
        url: url.to_owned(),
        max_ram: None,
        connect_timeout: Duration::from_secs(2),
        first_token_timeout: LONG,
        stall_timeout: LONG,
        total_timeout: LONG,
        retries: 0,
        parallel: 4,
        keep_alive: Duration::from_secs(300),
    }
}

fn client_with(config: &HostConfig) -> Arc<Client> {
    Arc::new(Client::new("lan".parse().unwrap(), config).unwrap())
}

fn client(host: &Host) -> Arc<Client> {
    client_with(&config(&host.url()))
}

fn hello() -> GenerateRequest {
    GenerateRequest::chat(vec![Message::user("hello")])
}

/// The text up to the end, and the end.
async fn ask(client: &Client, request: &GenerateRequest) -> (String, Result<Completion, Failure>) {
    let mut stream = match client.generate("solar:10.7b", Some(4096), request).await {
        Ok(stream) => stream,
        Err(error) => return (String::new(), Err(error.into())),
    };
    let mut text = String::new();
    loop {
        match stream.next().await.expect("a stream ends with Done or an error") {
            Ok(Delta::Text(piece)) => text += &piece,
            Ok(Delta::Done(completion)) => return (text, Ok(completion)),
            Err(failure) => return (text, Err(failure)),
        }
    }
}

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use sarai_agents::Error;
use sarai_agents::ollama::{Client, HostWatch, Watcher};
use sarai_agents::remote::HostApi;
use sarai_core::config::HostConfig;
use sarai_core::failure::FailureKind;
use sarai_core::units::Bytes;
use sarai_support::host::{Behaviour, Host};

use super::{LONG, SHORT, ask, config, hello, ollama};

const SEVEN_B: u64 = 4_100_000_000;

/// A host that may hold 6 GB, with five models of 7B on its disk.
async fn six_gb() -> (Host, Arc<Client>) {
    let host = Host::start().await.unwrap();
    for model in ["llama", "mistral", "qwen", "gemma", "falcon"] {
        // The file is smaller than what it takes.
        host.has(model, SEVEN_B);
    }
    let client = ollama(&HostConfig { max_ram: Some(Bytes(6_000_000_000)), ..config(&host.url()) });
    (host, client)
}

async fn say(client: &Client, model: &str) -> Result<(), Error> {
    use futures::TryStreamExt;
    client.generate(model, None, &hello()).await?.try_collect::<Vec<_>>().await.map(drop)
}

#[tokio::test]
async fn from_one_7b_to_another_the_first_is_unloaded_by_itself() {
    let (host, client) = six_gb().await;
    say(&client, "llama").await.unwrap();
    say(&client, "mistral").await.unwrap();
    assert_eq!(host.loaded(), ["mistral:latest"]);
    assert_eq!(host.most_held(), SEVEN_B);
}

#[tokio::test]
async fn five_in_a_row_and_fifty_switches_never_exceed_the_hosts_limit() {
    let (host, client) = six_gb().await;
    for model in ["llama", "mistral", "qwen", "gemma", "falcon"] {
        say(&client, model).await.unwrap();
    }
    for switch in 0..50 {
        say(&client, ["llama", "mistral"][switch % 2]).await.unwrap();
    }
    assert_eq!((host.most_held(), host.loaded().len()), (SEVEN_B, 1));
    // Nothing that could touch its disk was ever sent.
    let allowed = [
        ("GET", "/api/ps"),
        ("GET", "/api/tags"),
        ("GET", "/api/version"),
        ("POST", "/api/chat"),
        ("POST", "/api/embed"),
        ("POST", "/api/generate"),
    ];
    let sent: BTreeSet<(String, String)> =
        host.requests().into_iter().map(|request| (request.method, request.path)).collect();
    for (method, path) in &sent {
        assert!(allowed.contains(&(method.as_str(), path.as_str())), "{method} {path}");
    }
}

#[tokio::test]
async fn what_runs_or_is_kept_stays_and_the_host_is_full() {
    let (host, client) = six_gb().await;
    host.behave(Behaviour::StallAfter(1));
    let running = client.generate("llama", None, &hello()).await.unwrap();
    host.behave(Behaviour::Normal);
    let error = say(&client, "mistral").await.unwrap_err();
    assert!(matches!(error, Error::HostFull { .. }), "{error}");
    assert_eq!(error.kind(), FailureKind::Busy);
    assert!(error.to_string().contains("max_ram_gb of 6.00 GB"), "{error}");
    drop(running);
    client.keep(["llama".to_owned()]);
    assert!(matches!(say(&client, "mistral").await, Err(Error::HostFull { .. })));
    client.keep([]);
    say(&client, "mistral").await.unwrap();
    assert_eq!(host.loaded(), ["mistral:latest"]);
}

#[tokio::test]
async fn two_loads_at_once_do_not_take_the_same_room() {
    let (host, client) = six_gb().await;
    let (first, second) = tokio::join!(say(&client, "llama"), say(&client, "mistral"));
    assert!(first.is_ok() || second.is_ok());
    assert!(host.most_held() <= 6_000_000_000, "{}", host.most_held());
}

#[tokio::test]
async fn a_request_that_is_given_up_leaves_its_room_to_others() {
    let (host, client) = six_gb().await;
    host.behave(Behaviour::SlowFirstByte);
    let given_up = tokio::time::timeout(SHORT, say(&client, "llama")).await;
    assert!(given_up.is_err());
    host.behave(Behaviour::Normal);
    say(&client, "mistral").await.unwrap();
}

#[tokio::test]
async fn a_model_that_others_use_stays_and_the_one_that_they_left_goes() {
    let (host, client) = six_gb().await;
    host.use_elsewhere("llama");
    host.use_elsewhere("mistral");
    // Seen for the first time, looked at again, and used in between.
    let using = async {
        loop {
            host.use_elsewhere("mistral");
            tokio::task::yield_now().await;
        }
    };
    let held = tokio::select! { held = client.tidy() => held.unwrap(), () = using => unreachable!() };
    assert_eq!((held, host.loaded()), (Bytes(SEVEN_B), vec!["mistral:latest".to_owned()]));
}

#[tokio::test]
async fn an_unload_that_does_not_come_about_is_an_error_and_no_endless_loop() {
    let (host, client) = six_gb().await;
    say(&client, "llama").await.unwrap();
    host.hold_on();
    let slow = tokio::time::timeout(Duration::from_millis(500), say(&client, "mistral")).await;
    assert!(slow.is_err(), "it polls until its deadline of 15 s");
    assert_eq!(host.loaded(), ["llama:latest"]);
}

#[tokio::test]
async fn a_clock_that_jumps_unloads_nothing_that_is_in_use() {
    let (host, client) = six_gb().await;
    say(&client, "llama").await.unwrap();
    client.tidy().await.unwrap();
    host.jump_back();
    client.tidy().await.unwrap();
    assert_eq!(host.loaded(), ["llama:latest"]);
}

#[derive(Default)]
struct Notes {
    held: Mutex<Vec<Bytes>>,
    told: tokio::sync::Notify,
}

#[async_trait]
impl Watcher for Notes {
    async fn keeps(&self) -> Vec<String> {
        vec!["mistral".to_owned()]
    }

    async fn holds(&self, bytes: Bytes) {
        self.held.lock().unwrap().push(bytes);
        self.told.notify_one();
    }
}

#[tokio::test]
async fn a_watch_keeps_a_host_below_its_limit_by_itself_and_ends_with_its_owner() {
    let (host, client) = six_gb().await;
    host.use_elsewhere("llama");
    host.use_elsewhere("mistral");
    let notes = Arc::new(Notes::default());
    let watch = HostWatch::start(client, Duration::from_millis(10), Arc::<Notes>::clone(&notes));
    let tidied = async {
        while notes.held.lock().unwrap().last() != Some(&Bytes(SEVEN_B)) {
            notes.told.notified().await;
        }
    };
    tokio::time::timeout(LONG, tidied).await.unwrap();
    assert_eq!(host.loaded(), ["mistral:latest"], "what its owner wants is kept");
    drop(watch);
    let ended = async {
        while Arc::strong_count(&notes) > 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, ended).await.unwrap();
}

#[tokio::test]
async fn a_watch_outlives_a_host_that_is_away() {
    let url = Host::refusing().await.unwrap();
    let notes = Arc::new(Notes::default());
    let _watch =
        HostWatch::start(ollama(&config(&url)), Duration::from_millis(1), Arc::<Notes>::clone(&notes));
    for _ in 0..3 {
        tokio::time::timeout(LONG, notes.told.notified()).await.unwrap();
    }
    assert!(notes.held.lock().unwrap().iter().all(|bytes| *bytes == Bytes::ZERO));
}

#[tokio::test]
async fn without_a_limit_nothing_is_asked_before_a_request() {
    let host = Host::start().await.unwrap();
    ask(&*ollama(&config(&host.url())), &hello()).await.1.unwrap();
    assert_eq!(host.requests().len(), 1);
}

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use sarai_agents::remote::RemoteBackend;
use sarai_core::backend::{Asked, Backend, Breaker, Host as Chosen, LoadRequest, ServedBy};
use sarai_core::config::{HostConfig, HostKind};
use sarai_core::failure::FailureKind;
use sarai_core::memory::Estimate;
use sarai_core::request::{Capability, GenerateRequest, Message};
use sarai_support::host::{Behaviour, Host};

use super::{SHORT, ask_model, config, hello, named};

const FRESH: Asked<'_> = Asked { conversation: None, failed: &[], last_resort: false };

struct Three {
    hosts: Vec<Host>,
    backend: RemoteBackend,
    changes: Arc<Mutex<Vec<(String, Breaker)>>>,
}

/// Three hosts, `a`, `b` and `c`, with so many places each.
async fn three(parallel: usize) -> Three {
    let hosts =
        vec![Host::start().await.unwrap(), Host::start().await.unwrap(), Host::start().await.unwrap()];
    let apis = hosts.iter().zip(["a", "b", "c"]).map(|(host, name)| {
        let config = HostConfig { parallel, ..config(&host.url()) };
        (named(name, HostKind::Ollama, &config), "m".to_owned())
    });
    let backend = RemoteBackend::new(apis, None, Capability::Generate);
    let changes: Arc<Mutex<Vec<(String, Breaker)>>> = Arc::default();
    let seen = Arc::clone(&changes);
    let request = LoadRequest {
        hosts: Arc::new(move |change| {
            seen.lock().unwrap().push((change.host.to_string(), change.breaker));
        }),
        ..LoadRequest::new(Estimate::default())
    };
    backend.load(request).await.unwrap();
    Three { hosts, backend, changes }
}

impl Three {
    async fn next(&self, asked: Asked<'_>) -> Chosen {
        self.backend.hosts().unwrap().next(asked).await.unwrap().unwrap()
    }
}

fn name(chosen: &Chosen) -> String {
    chosen.served_by.to_string().replace("ollama_http:", "")
}

#[tokio::test]
async fn requests_spread_over_hosts_by_what_runs_there() {
    let three = three(10).await;
    let mut held = Vec::new();
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..30 {
        let chosen = three.next(FRESH).await;
        *count.entry(name(&chosen)).or_default() += 1;
        held.push(chosen);
    }
    assert_eq!(count.into_values().collect::<Vec<_>>(), [10, 10, 10]);
}

#[tokio::test]
async fn a_host_that_holds_the_model_comes_first_and_a_full_one_last() {
    let three = three(2).await;
    let second = three.next(Asked { failed: &[ServedBy::OllamaHttp("a".parse().unwrap())], ..FRESH }).await;
    assert_eq!(name(&second), "b");
    ask_model(&*second.model, hello()).await.1.unwrap();
    drop(second);
    let (first, next) = (three.next(FRESH).await, three.next(FRESH).await);
    assert_eq!((name(&first).as_str(), name(&next).as_str()), ("b", "b"), "it has the model");
    assert_eq!(name(&three.next(FRESH).await), "a", "it is full");
}

#[tokio::test]
async fn a_conversation_stays_where_it_was_answered() {
    let three = three(4).await;
    let first = GenerateRequest::chat(vec![Message::system("Be kind."), Message::user("Hi")]);
    let chosen = three.next(Asked { failed: &[ServedBy::OllamaHttp("a".parse().unwrap())], ..FRESH }).await;
    ask_model(&*chosen.model, first.clone()).await.1.unwrap();
    // All hold the model.
    for host in ["a", "c"] {
        let others: Vec<ServedBy> = ["a", "b", "c"]
            .iter()
            .filter(|h| **h != host)
            .map(|h| ServedBy::OllamaHttp(h.parse().unwrap()))
            .collect();
        let other = three.next(Asked { failed: &others, ..FRESH }).await;
        ask_model(&*other.model, hello()).await.1.unwrap();
    }
    assert_eq!(first.conversation(), None, "a first question can go anywhere");
    let messages = vec![
        Message::system("Be kind."),
        Message::user("Hi"),
        Message::assistant("Hello"),
        Message::user("And now?"),
    ];
    let conversation = GenerateRequest::chat(messages).conversation();
    assert_eq!(name(&three.next(Asked { conversation, ..FRESH }).await), "b");
    drop(chosen);
}

#[tokio::test]
async fn whoever_waits_gets_the_first_place_that_is_free_on_any_host() {
    let three = three(1).await;
    let mut held = vec![three.next(FRESH).await, three.next(FRESH).await, three.next(FRESH).await];
    let waiting = three.next(FRESH);
    tokio::pin!(waiting);
    assert!(futures::poll!(&mut waiting).is_pending());
    let freed = name(&held.remove(1));
    assert_eq!(name(&waiting.await), freed);
}

#[tokio::test]
async fn a_host_that_fails_three_times_is_left_alone_and_the_last_resort_is_asked_all_the_same() {
    let three = three(4).await;
    three.hosts[0].behave(Behaviour::Status(500, "{\"error\": \"out of memory\"}".into()));
    for host in &three.hosts[1..] {
        host.behave(Behaviour::Html);
    }
    for _ in 0..3 {
        let mut failed = Vec::new();
        for _ in 0..3 {
            let chosen = three.next(Asked { failed: &failed, ..FRESH }).await;
            ask_model(&*chosen.model, hello()).await.1.unwrap_err();
            failed.push(chosen.served_by);
        }
        let asked = Asked { failed: &failed, ..FRESH };
        assert!(three.backend.hosts().unwrap().next(asked).await.unwrap().is_none(), "all have failed");
    }
    let opened = |name: &str| (format!("ollama_http:{name}"), Breaker::Open);
    let mut changes = three.changes.lock().unwrap().clone();
    changes.sort();
    assert_eq!(changes, [opened("a"), opened("b"), opened("c")]);
    let failure = three.backend.available().unwrap_err();
    assert_eq!(failure.kind, FailureKind::HostError);
    assert!(failure.to_string().contains("out of memory"), "{failure}");
    assert!(three.backend.hosts().unwrap().next(FRESH).await.is_err());
    // There is nowhere else to go.
    let chosen = three.next(Asked { last_resort: true, ..FRESH }).await;
    three.hosts.iter().for_each(|host| host.behave(Behaviour::Normal));
    ask_model(&*chosen.model, hello()).await.1.unwrap();
    assert!(three.backend.available().is_ok());
    let states = three.backend.hosts().unwrap().states();
    let closed = states.iter().filter(|state| state.breaker == Breaker::Closed);
    assert_eq!(closed.count(), 1);
    assert!(states.iter().all(|state| (state.in_flight, state.parallel) != (4, 4)));
}

#[tokio::test]
async fn a_busy_host_is_not_broken_and_its_word_is_honoured() {
    let three = three(4).await;
    three.hosts[0].behave(Behaviour::RetryAfter(503, 3600));
    for _ in 0..9 {
        let chosen = three.next(FRESH).await;
        let busy = name(&chosen) == "a";
        let (_, end) = ask_model(&*chosen.model, hello()).await;
        assert_eq!(end.is_err(), busy);
    }
    assert_eq!(three.hosts[0].requests().len(), 1, "it is asked again when it said");
    assert!(three.changes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_no_fault_of_the_host() {
    let three = three(4).await;
    three.hosts[0].behave(Behaviour::Status(400, "{\"error\": \"bad options\"}".into()));
    for _ in 0..9 {
        let chosen = three.next(FRESH).await;
        ask_model(&*chosen.model, hello()).await.1.unwrap_err();
    }
    assert_eq!(three.hosts[0].requests().len(), 9);
    assert!(three.changes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn ten_thousand_requests_that_are_given_up_leave_nothing_behind() {
    let three = three(50).await;
    three.hosts.iter().for_each(|host| host.behave(Behaviour::StallAfter(1)));
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    for round in 0..200 {
        let asks = (0..50).map(async |n: usize| {
            let chosen = three.next(FRESH).await;
            let asking = ask_model(&*chosen.model, hello());
            // Before it is sent, on its way, or in the middle of the answer.
            let _given_up =
                tokio::time::timeout(SHORT * u32::try_from((round + n) % 3).unwrap() / 50, asking).await;
        });
        futures::future::join_all(asks).await;
    }
    for host in &three.hosts {
        assert!(host.connections_become(0, super::LONG).await, "each connection is closed");
    }
    let states = three.backend.hosts().unwrap().states();
    assert!(states.iter().all(|state| state.in_flight == 0), "{states:?}");
    let served = async |three: &Three| {
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() > before {
            tokio::task::yield_now().await;
        }
        three.hosts.iter().for_each(|host| host.behave(Behaviour::Normal));
        let chosen = three.next(FRESH).await;
        ask_model(&*chosen.model, hello()).await.1.unwrap();
    };
    tokio::time::timeout(super::LONG, served(&three)).await.unwrap();
}

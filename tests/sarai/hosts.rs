//! Several hosts that die, hang and fill up, behind the whole library; and the program's words about hosts.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use sarai::core::backend::Breaker;
use sarai::core::config::{self, Config, Env, Overrides};
use sarai::{
    Answer, AnswerEvent, AnswerStream, CallOptions, Error, GenerateRequest, Message, OnStreamFailure, Sarai,
};
use sarai_support::gguf::{Kind, Model};
use sarai_support::host::{Behaviour, Host};
use serde_json::json;
use tempfile::TempDir;

use super::{Site, nobody};

const STREAMS: usize = 200;
const LONG: Duration = Duration::from_secs(60);

fn read(folder: &TempDir, text: &str) -> Config {
    let path = folder.path().join("sarai.yaml");
    std::fs::write(&path, text).unwrap();
    config::load(&path, &Env::default(), &Overrides::default()).unwrap().config
}

/// Three hosts that hold SOLAR, `a`, `b` and `c`, and the library over them.
struct Three {
    hosts: Vec<Host>,
    sarai: Sarai,
    _folder: TempDir,
}

async fn three(model: &str, host: &str) -> Three {
    let hosts =
        vec![Host::start().await.unwrap(), Host::start().await.unwrap(), Host::start().await.unwrap()];
    let folder = tempfile::tempdir().unwrap();
    let entries: String = ["a", "b", "c"]
        .iter()
        .zip(&hosts)
        .map(|(name, at)| {
            format!("  {name}: {{url: '{}', parallel: {STREAMS}, watch: false, {host}}}\n", at.url())
        })
        .collect();
    let text = format!(
        "hosts:\n{entries}models:\n  solar: {{backend: ollama_http, host: [a, b, c], {model}}}\nqueue: {{max_waiting: 1000}}\n"
    );
    let sarai = Sarai::start(&read(&folder, &text)).unwrap();
    for client in sarai.ollamas().values() {
        client.preload("solar", None).await.unwrap();
    }
    Three { hosts, sarai, _folder: folder }
}

async fn ask(sarai: &Sarai, options: CallOptions) -> Result<AnswerStream, Error> {
    let request = GenerateRequest::chat(vec![Message::user("hola")]);
    sarai.pool().handle("solar")?.generate(request, options).await
}

/// The text, and how it ended.
async fn end(mut stream: AnswerStream) -> (String, Result<Answer, Error>) {
    let mut text = String::new();
    loop {
        match stream.next().await.expect("a stream ends with Done or an error") {
            Ok(AnswerEvent::Text(piece)) => text += &piece,
            Ok(AnswerEvent::Done(answer)) => return (text, Ok(answer)),
            Err(error) => return (text, Err(error)),
        }
    }
}

impl Three {
    /// Two hundred answers that have all begun; then the first host dies, the second hangs, and the third goes on.
    async fn begun_when_one_dies_and_one_hangs(
        &self,
        options: CallOptions,
    ) -> Vec<(String, Result<Answer, Error>)> {
        self.hosts.iter().for_each(|host| host.behave(Behaviour::StallAfter(2)));
        let begun = futures::future::join_all((0..STREAMS).map(|_| ask(&self.sarai, options))).await;
        let begun: Vec<AnswerStream> = begun.into_iter().map(Result::unwrap).collect();
        let count =
            |host: &Host| host.requests().iter().filter(|request| request.path == "/api/chat").count();
        let spread: Vec<usize> = self.hosts.iter().map(count).collect();
        let even = STREAMS / self.hosts.len();
        assert!(spread.iter().all(|n| n.abs_diff(even) * 5 <= even), "within a fifth of even: {spread:?}");
        self.hosts[0].kill();
        self.hosts[2].behave(Behaviour::Normal);
        let ends = futures::future::join_all(begun.into_iter().map(end));
        let released = async {
            loop {
                self.hosts[2].release();
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LONG, async {
            tokio::select! { ends = ends => ends, () = released => unreachable!() }
        })
        .await
        .expect("nothing hangs")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_of_three_hosts_dead_and_one_hung_no_answer_is_lost_where_they_go_on() {
    let three = three("on_stream_failure: continue", "stall_timeout: 500ms").await;
    let ends = three.begun_when_one_dies_and_one_hangs(CallOptions::default()).await;
    let mut handed_over = 0;
    for (text, answer) in ends {
        assert_eq!(text, "hola desde el host ñ😀");
        handed_over += usize::from(!answer.unwrap().handovers.is_empty());
    }
    assert!(handed_over >= STREAMS / 2, "{handed_over}");
    let status = three.sarai.pool().status().await.unwrap();
    assert_eq!((status.slots[0].leases, status.waiting), (0, 0));
    let states = three.sarai.pool().hosts().remove(0).1;
    assert!(states.iter().all(|state| state.in_flight == 0), "{states:?}");
    assert_eq!(states[0].breaker, Breaker::Open);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_of_three_hosts_dead_and_one_hung_answers_end_with_typed_errors_where_they_do_not_go_on() {
    let three = three("on_stream_failure: continue", "stall_timeout: 500ms").await;
    let options = CallOptions { on_stream_failure: Some(OnStreamFailure::Error), ..CallOptions::default() };
    let ends = three.begun_when_one_dies_and_one_hangs(options).await;
    let mut failed: BTreeMap<&'static str, usize> = BTreeMap::new();
    for (text, answer) in &ends {
        match answer {
            Ok(_) => assert_eq!(text, "hola desde el host ñ😀"),
            Err(Error::Request { cause, .. }) => {
                assert_eq!(text, "hola desde ");
                *failed.entry(cause.kind.as_str()).or_default() += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(failed.keys().copied().collect::<Vec<_>>(), ["cut_off", "timeout"]);
    assert!(failed.values().sum::<usize>() < ends.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_a_host_began_is_finished_by_the_local_file() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::CutAfter(2));
    let folder = tempfile::tempdir().unwrap();
    Model::new(Kind::Llama).write_to(folder.path().join("solar.gguf")).unwrap();
    let text = format!(
        "hosts: {{lan: {{url: '{}'}}}}\nmodels: {{solar: {{backend: ollama_http, fallback: gguf_native, host: lan, path: solar.gguf, on_stream_failure: continue, context: 1000}}}}\nsessions: {{max_gb: 0}}\n",
        host.url()
    );
    let sarai = Sarai::start(&read(&folder, &text)).unwrap();
    let (text, answer) = end(ask(&sarai, CallOptions::default()).await.unwrap()).await;
    let answer = answer.unwrap();
    assert!(text.starts_with("hola desde ") && text.len() > "hola desde ".len(), "{text}");
    assert_eq!((answer.handovers.len(), answer.handovers[0].at), (1, "hola desde ".len()));
    assert!(answer.provenance.served_by.to_string().ends_with("solar.gguf"));
    sarai.shutdown(LONG).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_of_the_open_protocol_serves_a_model_and_falls_back_as_any_other() {
    let host = Host::start().await.unwrap();
    let site = Site::new();
    site.write(
        "config/site.yaml",
        format!(
            "hosts: {{gpu: {{kind: openai, url: '{}/v1', api_key_env: GPU_KEY}}}}\nmodels: {{solar: {{backend: openai_http, host: gpu, fallback: gguf_native, path: ../models/demo/solar.gguf}}}}\n",
            host.url()
        ),
    );
    let asked = tokio::task::spawn_blocking(move || {
        let mut command = site.sarai("", &["chat", "solar", "hola", "--json"]);
        (command.env("GPU_KEY", "sk-1").output().unwrap(), site)
    });
    let (output, site) = asked.await.unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&answer["served_by"], &answer["text"]),
        (&json!("openai_http:gpu"), &json!("hola desde el host ñ😀"))
    );
    assert_eq!(host.requests()[0].authorization.as_deref(), Some("Bearer sk-1"));
    host.behave(Behaviour::Status(401, "{}".into()));
    let asked = tokio::task::spawn_blocking(move || {
        let mut command = site.sarai("", &["chat", "solar", "hola", "--json"]);
        command.env("GPU_KEY", "sk-1").output().unwrap()
    });
    let answer: serde_json::Value = serde_json::from_slice(&asked.await.unwrap().stdout).unwrap();
    assert!(answer["fallback_reason"].as_str().unwrap().starts_with("openai_http:gpu: "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ps_and_unload_work_with_hosts_alone() {
    let host = Host::start().await.unwrap();
    host.use_elsewhere("llama3.2:3b");
    let site = Site::new();
    site.write(
        "config/site.yaml",
        format!("hosts: {{lan: {{url: '{}', max_ram_gb: 16}}, away: {{url: '{}'}}}}\n", host.url(), nobody()),
    );
    let told = tokio::task::spawn_blocking(move || {
        let (ps, code, _) = site.json("", &["ps"]);
        assert_eq!(code, 0, "{ps}");
        let (unloaded, code, _) = site.json("", &["unload", "llama3.2:3b", "--host", "lan"]);
        assert_eq!((code, &unloaded["unloaded_from"]), (0, &json!(["ollama_http:lan"])));
        let (failed, code, _) = site.json("", &["unload", "llama3.2:3b", "--host", "away"]);
        assert_eq!((code, &failed["error"]["kind"]), (4, &json!("unreachable")));
        ps
    });
    let ps = told.await.unwrap();
    assert_eq!(ps["hosts"]["lan"]["models"][0]["name"], "llama3.2:3b");
    assert_eq!(
        (&ps["hosts"]["lan"]["max_bytes"], &ps["hosts"]["away"]["reachable"]),
        (&json!(16_000_000_000_u64), &json!(false))
    );
    assert!(host.loaded().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ollama_on_this_machine_counts_into_the_budget() {
    let host = Host::start().await.unwrap();
    host.has("llama", 4_000_000_000);
    host.use_elsewhere("llama");
    let folder = tempfile::tempdir().unwrap();
    let text = format!(
        "hosts: {{here: {{url: '{}', watch_interval: 10ms}}}}\nmemory: {{max_ram_gb: 6}}\n",
        host.url()
    );
    let config = read(&folder, &text);
    let sarai = Sarai::start(&config).unwrap();
    sarai.watch_hosts(&config);
    let counted = async {
        loop {
            let usage = sarai.pool().memory_usage().await.unwrap();
            if usage.others_bytes.0 == 4_000_000_000 {
                return usage;
            }
        }
    };
    let usage = tokio::time::timeout(LONG, counted).await.unwrap();
    assert!(usage.headroom_bytes.0 <= 2_000_000_000, "{usage:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_loaded_at_the_end_is_loaded_again_at_the_next_start_as_far_as_there_is_room() {
    let site = Site::new();
    let text = "models:\n  solar: {backend: gguf_native, path: ../models/demo/solar.gguf}\n  lfm2: {backend: gguf_native, class: preferred, path: ../models/demo/lfm2.gguf}\nmemory: {max_ram_gb: 1, restore: true}\nsessions: {max_gb: 0}\n";
    site.write("config/site.yaml", text);
    let config =
        config::load(&site.path("config/site.yaml"), &Env::default(), &Overrides::default()).unwrap().config;
    let cache = site.path("cache");
    let start = || Sarai::start_in(&config, Some(&cache)).unwrap();
    let loaded = async |sarai: &Sarai| {
        let status = sarai.pool().status().await.unwrap();
        let ready = status.slots.into_iter().filter(|slot| slot.reserved.0 > 0);
        ready.map(|slot| slot.model.to_string()).collect::<Vec<_>>()
    };
    let first = start();
    first.restore().await;
    assert!(loaded(&first).await.is_empty(), "nothing was written down yet");
    for model in ["lfm2", "solar"] {
        first.pool().load(model).await.unwrap();
    }
    first.shutdown(LONG).await;
    let second = start();
    second.restore().await;
    assert_eq!(loaded(&second).await, ["lfm2", "solar"]);
    second.pool().shutdown(LONG).await;

    let entries = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
    let path = entries.into_iter().find(|path| path.to_string_lossy().contains("loaded-")).unwrap();
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(written, json!({"version": 1, "models": ["lfm2", "solar"]}), "the preferred one first");
    for (content, restored) in [
        ("{\"version\":1,\"models\":[\"gone\",\"lfm2\"]}", vec!["lfm2"]),
        ("{\"version\":9,\"models\":[\"lfm2\"]}", vec![]),
        ("{broken", vec![]),
    ] {
        std::fs::write(&path, content).unwrap();
        let sarai = start();
        sarai.restore().await;
        assert_eq!(loaded(&sarai).await, restored, "{content}");
        sarai.pool().shutdown(LONG).await;
    }
    // With room for one of them alone.
    std::fs::write(&path, "{\"version\":1,\"models\":[\"lfm2\",\"solar\"]}").unwrap();
    let sarai = start();
    sarai.pool().set_budget(sarai::Bytes(16_000_000)).await.unwrap();
    sarai.restore().await;
    assert_eq!(loaded(&sarai).await, ["lfm2"]);
    sarai.pool().shutdown(LONG).await;
}

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use sarai_support::host::{Behaviour, Host};
use serde_json::{Value, json};

use super::{Site, is_file, nobody};

const VOICE: [&str; 4] = ["run", "voice-text", "--text", "¿Cómo se prueba el theorem?"];

#[test]
fn voice_text_runs_three_steps_and_solar_falls_back_to_its_file_and_says_why() {
    let host = nobody();
    let (report, code, stderr) = Site::new().json(&host, &VOICE);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(
        steps.iter().map(|step| step["id"].as_str().unwrap()).collect::<Vec<_>>(),
        ["pick", "expert", "tone"]
    );
    assert_eq!((&steps[0]["label"], &steps[0]["model"]), (&json!("hard"), &json!("solar")));
    let expert = &steps[1];
    assert!(is_file(&expert["served_by"], "solar.gguf"), "{expert}");
    let reason = expert["fallback_reason"].as_str().unwrap();
    assert!(
        reason.starts_with("ollama_http:lan: ") && reason.to_lowercase().contains("connection refused"),
        "{reason}"
    );
    assert!(reason.contains(&host), "{reason}");
    assert!(!expert["text"].as_str().unwrap().is_empty());
    assert!(is_file(&steps[2]["served_by"], "lfm2.gguf"));
    assert_eq!(steps[2]["fallback_reason"], Value::Null);
    assert_eq!(report["text"], steps[2]["text"]);
    for key in [
        "finish_reason",
        "truncated",
        "prompt_tokens",
        "completion_tokens",
        "queue_ms",
        "load_ms",
        "ttft_ms",
        "tokens_per_second",
        "n_ctx",
    ] {
        assert!(!expert[key].is_null(), "{key} is missing: {expert}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_host_that_answers_solar_is_served_by_it() {
    let host = Host::start().await.unwrap();
    let url = host.url();
    let (report, code, _) =
        tokio::task::spawn_blocking(move || Site::new().json(&url, &VOICE)).await.unwrap();
    assert_eq!(code, 0);
    let expert = &report["steps"][1];
    assert_eq!((&expert["served_by"], &expert["fallback_reason"]), (&json!("ollama_http:lan"), &Value::Null));
    assert_eq!(expert["text"], "hola desde el host ñ😀");
    assert_eq!(host.requests()[0].body["model"], "solar:10.7b");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_goes_wrong_on_the_host_before_its_first_word_the_file_answers() {
    let host = Host::start().await.unwrap();
    for (behaviour, said) in [
        (Behaviour::Status(404, "{\"error\":\"model 'solar:10.7b' not found\"}".into()), "not found"),
        (Behaviour::Status(500, "{}".into()), "status 500"),
        (Behaviour::Status(503, "{\"error\":\"server busy\"}".into()), "server busy"),
        (Behaviour::Html, "does not speak the protocol of its kind"),
        (Behaviour::CutAfter(0), "cut off"),
        (Behaviour::EndWithoutDone(0), "cut off"),
        (Behaviour::ErrorLineAfter(0, "out of memory".into()), "out of memory"),
    ] {
        host.behave(behaviour);
        let url = host.url();
        let asked = tokio::task::spawn_blocking(move || Site::new().json(&url, &["chat", "solar", "hola"]));
        let (answer, code, _) = asked.await.unwrap();
        assert_eq!(code, 0);
        assert!(is_file(&answer["served_by"], "solar.gguf"), "{answer}");
        assert!(answer["fallback_reason"].as_str().unwrap().contains(said), "{said}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_host_is_given_up_at_its_deadline_and_the_file_answers() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::BlackHole);
    let url = host.url();
    let asked = tokio::task::spawn_blocking(move || {
        let site = Site::new();
        let mut command = site.sarai(&url, &["chat", "solar", "hola", "--json"]);
        command.env("OLLAMA_TIMEOUT", "200ms").output().unwrap().stdout
    });
    let answer: Value = serde_json::from_slice(&asked.await.unwrap()).unwrap();
    assert!(
        answer["fallback_reason"].as_str().unwrap().contains("the first token took longer than 0.2 s"),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn solar_prefers_its_file_when_told_so() {
    let host = Host::start().await.unwrap();
    let url = host.url();
    let asked = tokio::task::spawn_blocking(move || {
        let site = Site::new();
        let mut command = site.sarai(&url, &["chat", "solar", "hola", "--json"]);
        command.env("SOLAR_PREFER_HTTP", "false").output().unwrap().stdout
    });
    let answer: Value = serde_json::from_slice(&asked.await.unwrap()).unwrap();
    assert!(is_file(&answer["served_by"], "solar.gguf"), "{answer}");
    assert_eq!(answer["fallback_reason"], Value::Null);
    assert!(host.requests().is_empty());
}

#[test]
fn the_same_seed_gives_the_same_answer() {
    let site = Site::new();
    let ask = |seed| {
        site.json(&nobody(), &["chat", "lfm2", "hola", "--seed", seed, "--max-tokens", "12"]).0["text"]
            .clone()
    };
    assert_eq!(ask("7"), ask("7"));
}

#[test]
fn texts_are_embedded_and_routed() {
    let site = Site::new();
    let (embedded, code, _) = site.json(&nobody(), &["embed", "embedding", "one", "two"]);
    assert_eq!((code, embedded["embeddings"].as_array().unwrap().len()), (0, 2));
    let (routing, code, _) = site.json(&nobody(), &["route", "hello there"]);
    assert_eq!((code, &routing["label"], &routing["model"]), (0, &json!("soft"), &json!("lfm2")));
    assert!(routing["reason"].as_str().unwrap().contains("soft goes to lfm2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn ps_shows_models_here_and_on_the_host_and_unload_frees_them_there() {
    let host = Host::start().await.unwrap();
    let (site, url) = (Site::new(), host.url());
    let run = move |arguments: &'static [&'static str]| {
        let (site, url) = (&site, &url);
        tokio::task::block_in_place(|| site.json(url, arguments))
    };
    run(&["chat", "solar", "hola"]);
    let (ps, code, _) = run(&["ps"]);
    assert_eq!(code, 0);
    assert_eq!(ps["hosts"]["lan"]["models"][0]["name"], "solar:10.7b");
    let lfm2 = ps["models"].as_array().unwrap().iter().find(|model| model["model"] == "lfm2").unwrap();
    assert_eq!(lfm2["state"], "absent");
    assert!(lfm2["estimated_bytes"].as_u64().unwrap() > 500_000, "{lfm2}");
    let (unloaded, code, _) = run(&["unload", "solar"]);
    assert_eq!((code, &unloaded["unloaded_from"]), (0, &json!(["ollama_http:lan"])));
    assert!(host.loaded().is_empty());
    run(&["chat", "solar", "hola"]);
    run(&["unload", "solar", "--host", "lan"]);
    assert!(host.loaded().is_empty());
    assert!(host.requests().iter().all(|request| request.method != "DELETE"));
}

#[test]
fn a_plan_shows_what_would_be_loaded_and_loads_nothing() {
    let (plans, code, _) = Site::new().json(&nobody(), &["plan", "solar", "lfm2"]);
    assert_eq!(code, 0);
    let plans = plans.as_array().unwrap();
    assert_eq!(plans.len(), 3);
    assert_eq!((&plans[0]["served_by"], &plans[1]["fallback"]), (&json!("ollama_http:lan"), &json!(true)));
    assert!(plans[1]["estimate"]["total"].as_u64() > plans[1]["estimate"]["weights"].as_u64());
    assert_eq!((&plans[2]["fits"], &plans[2]["load"]), (&json!(true), &json!(["lfm2"])));
}

#[test]
fn a_trace_is_played_on_several_budgets_and_loads_nothing() {
    let site = Site::new();
    // What a projector takes for a large image would hide the rest.
    let blind = include_str!("site.yaml").replace("    mmproj:", "    # mmproj:");
    site.write("config/site.yaml", blind);
    // SOLAR's host costs nothing here; the other two fit together only in the larger budget.
    site.write("trace.csv", "time, model, seconds\n0, lfm2, 1\n10, omni, 1\n20, lfm2, 1\n30, solar, 1\n");
    let budgets = ["--budget", "0.02", "--budget", "1"];
    let arguments = [&["simulate", "trace.csv", "--eviction", "lru"][..], &budgets].concat();
    let (object, code, _) = site.json(&nobody(), &arguments);
    assert_eq!(code, 0, "{object}");
    let [small, large] = object["simulations"].as_array().unwrap().as_slice() else { panic!("{object}") };
    let counts =
        |one: &Value| ["requests", "served", "loads", "evictions"].map(|key| one[key].as_u64().unwrap());
    assert_eq!((counts(small), counts(large)), ([4, 4, 4, 2], [4, 4, 3, 0]), "{object}");
    assert_eq!(large["eviction"], "lru");
    assert_eq!(large["assumed_load_times"], json!(["lfm2", "omni"]));

    // The same in JSON lines, from stdin.
    let lines = r#"{"time": 0, "model": "lfm2"}"#;
    let mut command = site.sarai(&nobody(), &["simulate", "-", "--json"]);
    let object: Value = serde_json::from_slice(&command.write_stdin(lines).output().unwrap().stdout).unwrap();
    assert_eq!(object["simulations"].as_array().unwrap().len(), 2, "by cost and LRU");
}

#[test]
fn a_bad_trace_is_told_with_its_line() {
    let site = Site::new();
    for (trace, said) in [
        ("when,model\n1,lfm2\n", "trace.csv, line 1: no column \"time\""),
        ("time,model\n1,lfm2\nsoon,lfm2\n", "line 3: "),
        ("time,model\n-1,lfm2\n", "line 2: time is not a number of seconds"),
        ("{\"time\": 1}\n", "line 1: missing field `model`"),
        ("time,model\n", "it has no requests"),
        ("time,model\n1,lmf2\n", "unknown model \"lmf2\", did you mean \"lfm2\"?"),
    ] {
        site.write("trace.csv", trace);
        let (object, code, _) = site.json(&nobody(), &["simulate", "trace.csv"]);
        let message = object["error"]["message"].as_str().unwrap();
        assert!(message.contains(said), "{message}");
        assert_eq!(code, 2, "{message}");
    }
}

#[test]
fn a_check_tells_every_setting_and_where_it_comes_from() {
    let site = Site::new();
    let output = site.sarai(&nobody(), &["check", "--resolved", "--max-ram-gb", "3"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("memory.max_ram_gb: 3  # flag --max-ram-gb"), "{text}");
    assert!(text.contains("OLLAMA_BASE_URL"), "{text}");
}

#[test]
fn a_conversation_goes_on_until_its_input_ends_and_its_metrics_can_be_read_meanwhile() {
    let site = Site::new();
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let config =
        include_str!("site.yaml").to_owned() + &format!("\nmetrics: {{listen: \"127.0.0.1:{port}\"}}\n");
    site.write("config/site.yaml", config);
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("sarai"))
        .args(["--config", "config/site.yaml", "chat", "lfm2", "--max-tokens", "8"])
        .current_dir(site.folder.path())
        .env_clear()
        .env("HOME", site.folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    for question in ["hola", "¿y mañana?"] {
        writeln!(stdin, "{question}").unwrap();
        assert!(!answers.next().unwrap().unwrap().is_empty());
    }
    let metrics = reqwest_get(&format!("http://127.0.0.1:{port}/metrics"));
    drop(stdin);
    assert!(child.wait().unwrap().success());
    for expected in [
        "sarai_budget_bytes 1000000000",
        "sarai_llms_loaded 1",
        "sarai_loads_total{model=\"lfm2\"",
        "sarai_tokens_total{model=\"lfm2\",kind=\"completion\"}",
        "sarai_ttft_seconds",
    ] {
        assert!(metrics.contains(expected), "{expected}:\n{metrics}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversation_is_kept_and_goes_on() {
    for signal in ["INT", "TERM"] {
        let site = Site::new();
        let config = include_str!("site.yaml").replace("sessions: {max_gb: 0}", "sessions: {path: kept}");
        site.write("config/site.yaml", config);
        let question = "the dog and the cat are here and now ".repeat(15);
        let mut child = Command::new(assert_cmd::cargo::cargo_bin!("sarai"))
            .args(["--config", "config/site.yaml", "chat", "lfm2", "--max-tokens", "8", "--temperature", "0"])
            .current_dir(site.folder.path())
            .env_clear()
            .env("HOME", site.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
        writeln!(stdin, "{question}").unwrap();
        assert!(!answers.next().unwrap().unwrap().is_empty());
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}");
        let (answer, _, _) =
            site.json(&nobody(), &["chat", "lfm2", question.trim_end(), "--max-tokens", "2"]);
        assert!(answer["cached_tokens"].as_u64().unwrap() > 32, "{signal}: {answer}");
    }
}

fn reqwest_get(url: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { reqwest::get(url).await.unwrap().text().await.unwrap() })
}

/// `sarai demo`, away from the repository: with the models that it brings.
fn demo(arguments: &[&str]) -> std::process::Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = assert_cmd::Command::new(assert_cmd::cargo::cargo_bin!("sarai"));
    command.current_dir(folder.path()).env_clear().env("HOME", folder.path());
    command.env("OLLAMA_BASE_URL", nobody()).arg("demo").args(arguments).output().unwrap()
}

#[test]
fn the_demo_plays_three_uses_and_ends_with_the_memory_table() {
    let output = demo(&[]);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    for said in [
        "what is the memory budget",
        "The memory budget is the number of bytes that all loaded models may take together.",
        "A large red circle on a blue background.",
        "The background is blue.",
        "ms one after another",
    ] {
        assert!(stdout.contains(said), "{said}: {stdout}");
    }
    let last: Vec<&str> = stdout.lines().rev().take(2).collect();
    assert!(last[1].ends_with("3 of 3 LLMs") && last[0].starts_with("this process "), "{stdout}");
    for model in ["embedding", "router", "lfm2", "omni", "solar.gguf", "ollama_http:lan"] {
        assert!(stdout.contains(model), "{model}: {stdout}");
    }
    assert!(stderr.contains("These are toy models") && stderr.contains("config/sarai.yaml"), "{stderr}");
}

#[test]
fn what_models_hold_is_measured_and_lies_within_their_estimates() {
    let output = demo(&["--json"]);
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(shown["voice"]["steps"][1]["fallback_reason"].is_string(), "SOLAR's host is not there: {shown}");
    let memory = &shown["memory"];
    assert!(memory["used_bytes"].as_u64() <= memory["budget_bytes"].as_u64());
    assert_eq!((&memory["llms"], &memory["max_concurrent_llms"]), (&json!(3), &json!(3)));
    let models = memory["models"].as_array().unwrap();
    let local = |model: &&Value| model["served_by"].as_str().unwrap().starts_with("gguf_native:");
    let local: Vec<&Value> = models.iter().filter(local).collect();
    assert_eq!(local.len(), 5);
    for model in local {
        let bytes = |key: &str| model[key].as_u64();
        assert!(bytes("estimated_bytes") > Some(1_000_000), "{model}");
        // Where the system does not tell what a process holds of a file, there is only the estimate.
        if cfg!(target_os = "linux") {
            assert!(bytes("measured_bytes").is_some_and(|measured| measured > 500_000), "{model}");
            assert!(bytes("measured_bytes") <= bytes("estimated_bytes"), "{model}");
        }
    }
}

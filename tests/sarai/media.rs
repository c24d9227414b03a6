//! Hearing, seeing and changing the tone from the command line; several models at once.

use std::time::Duration;

use futures::StreamExt;
use sarai::core::config::{self, Env, Overrides};
use sarai::{Audio, CallOptions, Input, PipelineEvent, Sarai};
use sarai_support::host::{Behaviour, Host};
use serde_json::{Value, json};

use super::{Site, is_file, nobody};

const WAV: &[u8] = include_bytes!("../../config/demo/question.wav");
const PNG: &[u8] = include_bytes!("../../config/demo/picture.png");

fn site() -> Site {
    let site = Site::new();
    site.write("question.wav", WAV);
    site.write("picture.png", PNG);
    site
}

fn steps(report: &Value) -> Vec<(&str, &str)> {
    let steps = report["steps"].as_array().unwrap().iter();
    steps.map(|step| (step["id"].as_str().unwrap(), step["kind"].as_str().unwrap())).collect()
}

#[test]
fn the_voice_pipeline_hears_answers_and_says_it_again() {
    let (report, code, stderr) = site().json(&nobody(), &["run", "voice", "--audio", "question.wav"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(steps(&report), [("stt", "transcribe"), ("expert", "prompt"), ("tone", "modulate")]);
    let [stt, expert, tone] = [0, 1, 2].map(|step| &report["steps"][step]);
    // Half a minute of audio, and the words around it.
    assert!(stt["prompt_tokens"].as_u64().unwrap() > 750, "{stt}");
    assert!(is_file(&stt["served_by"], "omni.gguf") && is_file(&tone["served_by"], "lfm2.gguf"));
    assert!(is_file(&expert["served_by"], "solar.gguf") && !expert["fallback_reason"].is_null(), "{expert}");
    assert!(!report["text"].as_str().unwrap().is_empty() && report["text"] == tone["text"]);
    let started = |step: &Value| step["started_ms"].as_u64().unwrap();
    let said = started(stt) + stt["duration_ms"].as_u64().unwrap();
    assert!(said <= started(expert) && started(expert) <= started(tone), "{report}");
}

#[test]
fn the_vision_pipeline_sees_and_the_soft_one_opens_at_once() {
    let site = site();
    let vision = ["run", "vision", "--image", "picture.png", "--text", "What is it?"];
    let (report, code, stderr) = site.json(&nobody(), &vision);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(steps(&report), [("see", "describe"), ("expert", "prompt")]);
    assert!(is_file(&report["steps"][0]["served_by"], "omni.gguf"));
    let (report, code, _) = site.json(&nobody(), &["run", "soft_hard", "--text", "hello"]);
    assert_eq!((code, steps(&report).len()), (0, 3));
    let started = |step: usize| report["steps"][step]["started_ms"].as_u64().unwrap();
    assert!(started(0) < 100 && started(1) < 100, "both begin at once: {report}");
}

#[test]
fn the_examples_hear_see_soften_and_answer() {
    let site = site();
    let folder = assert_cmd::cargo::cargo_bin!("sarai").parent().unwrap().join("examples");
    for (example, arguments, said) in [
        ("voice", &["question.wav"][..], &["[stt took ", "[expert took ", "[tone took "][..]),
        ("vision", &["picture.png", "What is it?"], &["omni sees: ", "solar says: "]),
        ("soft_hard", &["Why does it fail?"], &[" ms)"]),
        ("tone", &["It failed."], &["brief: ", "empathetic: ", "formal: ", "friendly: "]),
    ] {
        let program = folder.join(example).with_extension(std::env::consts::EXE_EXTENSION);
        assert!(
            program.exists(),
            "{} is missing: `cargo build --release --examples` makes it",
            program.display()
        );
        let mut command = std::process::Command::new(program);
        command
            .current_dir(site.path(""))
            .env_clear()
            .env("HOME", site.path(""))
            .env("OLLAMA_BASE_URL", nobody());
        let output = command.arg("config/site.yaml").args(arguments).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{example}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(said.iter().all(|said| stdout.contains(said)), "{example}: {stdout}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_dropped_in_its_middle_leaves_no_slot_busy() {
    let site = site();
    let path = site.path("config/site.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let env = Env::new([("OLLAMA_BASE_URL".to_owned(), nobody())].into(), [].into());
    let config = config::parse(&text, Some(&path), &env, &Overrides::default()).unwrap().config;
    let sarai = Sarai::start(&config).unwrap();
    let input = Input::default().with_audio(Audio::new(WAV).unwrap());
    for until in ["stt", "expert", "tone"] {
        let mut run = sarai.run("voice", &input, CallOptions::default()).unwrap();
        while !matches!(
            run.next().await.expect("each step says something").unwrap(),
            PipelineEvent::StepText { step, .. } if step.as_str() == until
        ) {}
        drop(run);
        let status = sarai.pool().status().await.unwrap();
        let busy: usize = status.slots.iter().map(|slot| slot.leases + slot.waiting).sum();
        assert_eq!((busy, status.waiting), (0, 0), "{until}: {status:?}");
    }
    sarai.shutdown(Duration::from_secs(10)).await;
}

#[test]
fn one_request_hears_sees_or_changes_the_tone() {
    let site = site();
    for arguments in [
        &["transcribe", "omni", "question.wav", "--language", "es"][..],
        &["describe", "omni", "picture.png", "--max-tokens", "8"],
        &[
            "chat",
            "omni",
            "What is it?",
            "--image",
            "picture.png",
            "--audio",
            "question.wav",
            "--max-tokens",
            "8",
        ],
    ] {
        let (answer, code, stderr) = site.json(&nobody(), arguments);
        assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}: {answer}");
        assert!(
            is_file(&answer["served_by"], "omni.gguf") && !answer["text"].as_str().unwrap().is_empty(),
            "{answer}"
        );
    }
    let (answer, code, _) = site.json(&nobody(), &["modulate", "lfm2", "formal", "hi there"]);
    assert_eq!((code, is_file(&answer["served_by"], "lfm2.gguf")), (0, true));
}

#[test]
fn what_is_no_audio_or_image_says_so_with_its_name() {
    let site = site();
    site.write("text.wav", "this is a text");
    site.write("broken.wav", [b"RIFF\xff\xff\xff\xffWAVE".as_slice(), b"and nothing of the kind"].concat());
    site.write("empty.png", "");
    let mut enormous = PNG.to_vec();
    enormous[16..24].copy_from_slice(&[0, 0, 0x4e, 0x20, 0, 0, 0x4e, 0x20]);
    site.write("enormous.png", enormous);
    for (arguments, code, said) in [
        (["transcribe", "omni", "text.wav"], 2, "text.wav: it is neither WAV, FLAC, MP3 nor OGG"),
        (["transcribe", "omni", "missing.wav"], 2, "cannot read missing.wav"),
        (["transcribe", "omni", "broken.wav"], 1, "the audio cannot be read: "),
        (["describe", "omni", "empty.png"], 2, "empty.png: it is neither PNG, JPEG, WebP nor GIF"),
        (["describe", "omni", "enormous.png"], 1, "the image cannot be read: "),
        (["transcribe", "lfm2", "question.wav"], 2, "model lfm2 cannot transcribe audio"),
        (["describe", "lfm2", "picture.png"], 2, "model lfm2 cannot see images"),
        (["modulate", "lfm2", "freindly"], 2, "unknown tone"),
    ] {
        let (answer, found, _) = site.json(&nobody(), &arguments);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!((found, message.contains(said)), (code, true), "{arguments:?}: {answer}");
    }
    let (answer, code, _) = site.json(&nobody(), &["run", "voice", "--text", "hello"]);
    assert_eq!((code, &answer["error"]["message"]), (2, &json!("pipeline voice needs audio")));
}

#[test]
fn a_projector_that_is_missing_or_another_models_is_named() {
    let site = site();
    let mmproj = site.path("models/demo/mmproj.gguf");
    let asked = |said: &str| {
        let (answer, code, _) = site.json(&nobody(), &["describe", "omni", "picture.png"]);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(code == 1 && message.contains("mmproj.gguf") && message.contains(said), "{said}: {answer}");
    };
    sarai_support::gguf::Projector::new(256).write_to(&mmproj).unwrap();
    asked("projection_dim of 256");
    std::fs::remove_file(&mmproj).unwrap();
    asked("cannot read");
}

#[test]
fn several_models_at_once_are_measured_and_checked() {
    let site = site();
    let concurrent = ["bench", "concurrent", "--shape", "tiny", "--tokens", "12", "--runs", "1"];
    let (report, code, _) = site.json(&nobody(), &concurrent);
    let models = report["models"].as_array().unwrap();
    assert_eq!(
        models.iter().map(|row| row["model"].as_str().unwrap()).collect::<Vec<_>>(),
        ["solar", "lfm2", "omni"]
    );
    assert_eq!(models[2]["saw_image"], true);
    assert!(!models[0]["fallback_reason"].is_null(), "{report}");
    for row in models {
        for speed in ["alone", "at_once"] {
            assert!(row[speed]["tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
            assert!(row[speed]["first_token_ms"].as_f64().unwrap() > 0.0, "{row}");
        }
        assert!(row["measured_bytes"].as_u64().unwrap() > 100_000, "{row}");
    }
    let checks = report["checks"].as_array().unwrap();
    // How fast tiny models are together is a matter of microseconds.
    let fails = |check: &&Value| check["holds"] == false && check["counts"] == true;
    assert_eq!((code, checks.iter().find(fails)), (0, None), "{report}");
    let speed = checks.iter().find(|check| check["what"] == "at least as fast as one after another").unwrap();
    assert_eq!((&speed["counts"], checks.len()), (&json!(false), 5));
    assert!(report["ratio"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["peak_bytes"].as_u64() > Some(0) && report["reserved_peak_bytes"].as_u64() > Some(0));
    assert_eq!((&report["evictions"], &report["failed"]), (&json!([]), &json!([])));
    for total in ["one_after_another", "at_once"] {
        assert_eq!(report[total]["tokens"], 3 * 12, "they never end by themselves: {report}");
    }

    let (error, code, _) = site.json(&nobody(), &[&concurrent[..], &["--max-ram-gb", "0.001"]].concat());
    assert_eq!((code, &error["error"]["kind"]), (3, &json!("over_budget")), "{error}");
    let limit = [&concurrent[..], &["--max-concurrent-llms", "2"]].concat();
    let (error, code, _) = site.json(&nobody(), &limit);
    assert_eq!((code, &error["error"]["kind"]), (3, &json!("over_budget")), "{error}");
}

#[test]
fn models_that_fit_one_by_one_and_not_together_are_over_budget() {
    let site = site();
    let (plans, _, _) = site.json(&nobody(), &["plan", "embedding", "router", "omni", "lfm2", "solar"]);
    let needs = |name: &str| {
        let of_it = plans.as_array().unwrap().iter().filter(|plan| plan["model"] == name);
        of_it.filter_map(|plan| plan["estimate"]["total"].as_u64()).max().unwrap()
    };
    let helpers = needs("embedding") + needs("router");
    // Room for the helpers and the largest, with what is kept spare, but for neither of the small ones beside them.
    let room = helpers + needs("omni") + needs("lfm2").min(needs("solar")) / 2;
    let room = (room as f64 * 1.02 / 1e9).to_string();
    let bench = ["bench", "concurrent", "--tokens", "4", "--runs", "1", "--max-ram-gb", room.as_str()];
    let (error, code, _) = site.json(&nobody(), &bench);
    assert_eq!((code, &error["error"]["kind"]), (3, &json!("over_budget")), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("cannot be there at once"), "{error}");
    assert!(error["error"]["asked_bytes"].as_u64() > error["error"]["budget_bytes"].as_u64(), "{error}");
}

#[test]
fn an_installation_that_lacks_something_is_told_so_and_of_the_models_that_can_be_made() {
    let site = site();
    std::fs::remove_file(site.path("models/demo/lfm2.gguf")).unwrap();
    std::fs::remove_file(site.path("models/demo/embedding.gguf")).unwrap();
    let told = |site: &Site, arguments: &[&str], said: &[&str]| {
        let (error, code, _) = site.json(&nobody(), arguments);
        let message = error["error"]["message"].as_str().unwrap();
        assert!(code == 2 && said.iter().all(|said| message.contains(said)), "{code}: {error}");
    };
    told(&site, &["bench", "concurrent"], &["demo/lfm2.gguf", "demo/embedding.gguf", "--shape tiny"]);
    told(&site, &["bench", "concurrent", "--models", "solar,onmi"], &["did you mean \"omni\"?"]);
    told(&site, &["bench", "concurrent", "--models", "embedding"], &["model embedding writes no text"]);
    let mut command = assert_cmd::Command::new(assert_cmd::cargo::cargo_bin!("sarai"));
    command.current_dir(site.path("models")).env_clear().env("HOME", site.path("models"));
    let output = command.args(["bench", "concurrent"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.contains("config/sarai.yaml") && stderr.contains("--shape tiny"), "{stderr}");
}

#[test]
fn audio_comes_from_stdin_too_and_a_missing_projector_is_a_warning_of_the_check() {
    let site = site();
    let mut command = site.sarai(&nobody(), &["transcribe", "omni", "-", "--json"]);
    let output = command.write_stdin(WAV).output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!answer["text"].as_str().unwrap().is_empty(), "{answer}");
    std::fs::remove_file(site.path("models/demo/mmproj.gguf")).unwrap();
    let (checked, code, _) = site.json(&nobody(), &["check"]);
    let warned = checked["warnings"][0].as_str().unwrap();
    assert!(code == 0 && warned.starts_with("models.omni.mmproj: "), "{checked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_begins_again_says_so_on_a_line_of_its_own() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::CutAfter(2));
    let site = Site::new();
    let pipeline = "{steps: [{id: expert, model: solar, prompt: '{{ input.text }}', retry: 1}]}";
    site.write(
        "config/site.yaml",
        format!(
            "hosts: {{lan: {{url: '{}', watch: false}}}}\nmodels: {{solar: {{backend: ollama_http, host: lan}}}}\npipelines: {{again: {pipeline}}}\n",
            host.url()
        ),
    );
    let ran = tokio::task::spawn_blocking(move || {
        site.sarai("", &["run", "again", "--text", "hola"]).output().unwrap()
    });
    let output = ran.await.unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!((output.status.code(), &*stdout), (Some(1), "hola desde \nhola desde \n"), "{stderr}");
    assert!(stderr.lines().any(|line| line.starts_with("expert begins again, attempt 2: ")), "{stderr}");
}

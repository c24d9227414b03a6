//! Each mistake: what is said, and with which exit code.

use serde_json::Value;

use super::{Site, nobody};

/// The error's kind, message and the exit code.
fn error(site: &Site, arguments: &[&str]) -> (String, String, i32) {
    let (object, code, _) = site.json(&nobody(), arguments);
    let text =
        |key: &str| object["error"][key].as_str().unwrap_or_else(|| panic!("no {key}: {object}")).to_owned();
    (text("kind"), text("message"), code)
}

fn with_config(from: &str, to: &str) -> Site {
    let site = Site::new();
    let text = include_str!("site.yaml");
    assert!(text.contains(from), "{from}");
    site.write("config/site.yaml", text.replace(from, to));
    site
}

#[test]
fn a_model_larger_than_the_budget_is_over_budget_with_the_numbers() {
    let site = Site::new();
    let (object, code, _) = site.json(&nobody(), &["chat", "lfm2", "hola", "--max-ram-gb", "0.001"]);
    assert_eq!(code, 3);
    let error = &object["error"];
    assert_eq!(
        (error["kind"].as_str(), error["budget_bytes"].as_u64()),
        (Some("over_budget"), Some(1_000_000))
    );
    assert!(error["asked_bytes"].as_u64() > error["left_bytes"].as_u64());
    assert!(error["hint"].as_str().unwrap().contains("max_ram_gb"));
    let (plan, code, _) = site.json(&nobody(), &["plan", "lfm2", "--max-ram-gb", "0.001"]);
    assert_eq!((code, &plan[0]["fits"]), (3, &Value::Bool(false)));
    assert!(plan[0]["refuse"].as_str().unwrap().contains("model lfm2 needs "), "{plan}");
}

#[test]
fn a_missing_file_is_named() {
    let site = Site::new();
    std::fs::remove_file(site.path("models/demo/lfm2.gguf")).unwrap();
    let (kind, message, code) = error(&site, &["chat", "lfm2", "hola"]);
    assert_eq!((kind.as_str(), code), ("failed", 1));
    assert!(message.contains("lfm2.gguf") && message.contains("No such file"), "{message}");
    let (checked, code, _) = site.json(&nobody(), &["check"]);
    assert_eq!(code, 0, "the configuration itself is good");
    assert_eq!(checked["warnings"][0], "models.lfm2.path: models/demo/lfm2.gguf is not there");
}

#[test]
fn files_that_are_no_models_are_named_with_what_is_wrong() {
    let site = Site::new();
    let whole = std::fs::read(site.path("models/demo/lfm2.gguf")).unwrap();
    for (content, said) in [
        (&b"some notes about models"[..], "is not a GGUF file: it starts with \"some\""),
        (&whole[..whole.len() / 2], "is truncated"),
        (&whole[..50], "is truncated"),
        (&[], "is empty"),
    ] {
        site.write("models/demo/lfm2.gguf", content);
        let (kind, message, code) = error(&site, &["chat", "lfm2", "hola"]);
        assert_eq!((kind.as_str(), code), ("failed", 1));
        assert!(message.contains("lfm2.gguf") && message.contains(said), "{message}");
    }
}

#[test]
fn unknown_names_are_usage_errors_with_the_nearest_name() {
    let site = Site::new();
    let (kind, message, code) = error(&site, &["chat", "lfm", "hola"]);
    assert_eq!((kind.as_str(), code), ("usage", 2));
    assert!(message.contains("did you mean \"lfm2\"?"), "{message}");
    let (_, message, code) = error(&site, &["run", "voice-txt", "--text", "hola"]);
    assert_eq!((message.as_str(), code), ("unknown pipeline \"voice-txt\", did you mean \"voice-text\"?", 2));
    let (_, message, code) = error(&site, &["unload", "solar", "--host", "lam"]);
    assert_eq!((message.as_str(), code), ("unknown host \"lam\", did you mean \"lan\"?", 2));
    let (_, message, code) = error(&site, &["embed", "lfm2", "hola"]);
    assert_eq!((message.as_str(), code), ("model lfm2 cannot embed", 2));
}

#[test]
fn mistakes_in_the_configuration_are_told_with_file_line_and_path() {
    for (from, to, said) in [
        ("max_concurrent_llms: 3", "max_concurent_llms: 3", "did you mean `max_concurrent_llms`?"),
        (
            "{{ expert.text }}",
            "{{ exprt.text }}",
            "pipelines.voice-text.steps[2].modulate: `exprt` is neither",
        ),
        ("${OLLAMA_BASE_URL:-http://127.0.0.1:11434}", "not an address", "hosts.lan.url"),
        ("fallback: gguf_native", "fallback: lfm3", "did you mean `lfm2`?"),
    ] {
        let site = with_config(from, to);
        for command in [&["check"][..], &["chat", "lfm2", "hola"]] {
            let (kind, message, code) = error(&site, command);
            assert_eq!((kind.as_str(), code), ("config", 2), "{message}");
            assert!(message.starts_with("config/site.yaml:") && message.contains(said), "{message}");
        }
    }
}

#[test]
fn an_unreachable_host_without_a_fallback_has_a_code_of_its_own() {
    let site = with_config("    fallback: gguf_native\n", "");
    let (kind, message, code) = error(&site, &["chat", "solar", "hola"]);
    assert_eq!((kind.as_str(), code), ("unreachable", 4));
    assert!(message.to_lowercase().contains("connection refused"), "{message}");
}

#[test]
fn no_configuration_at_all_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = assert_cmd::Command::new(assert_cmd::cargo::cargo_bin!("sarai"));
    let output = command
        .args(["ps"])
        .current_dir(folder.path())
        .env_clear()
        .env("HOME", folder.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.contains("config/sarai.yaml") && stderr.contains("hint: try `sarai demo`"), "{stderr}");
}

#[test]
fn bad_usage_is_told_by_the_command_line_itself() {
    let site = Site::new();
    assert_eq!(site.sarai(&nobody(), &["chat"]).output().unwrap().status.code(), Some(2));
    assert_eq!(site.sarai(&nobody(), &["run", "voice-text"]).output().unwrap().status.code(), Some(2));
}

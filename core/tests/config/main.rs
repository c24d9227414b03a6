//! The configuration: what is accepted, what is refused and how it is said, where settings come from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sarai_core::config::{self, ConfigError, Env, ModelConfig, Overrides, Problem, Resolved};

mod accepted;
mod problems;
mod shipped;
mod sources;
mod variables;

/// The smallest models that others can refer to.
const MODELS: &str = "
models:
  solar: {backend: ollama_http, fallback: gguf_native}
  lfm2: {backend: gguf_native}
  embedding: {role: embedding, backend: gguf_native}
";

fn parse_in(text: &str, env: &Env) -> Result<Resolved, ConfigError> {
    config::parse(text, Some(Path::new("config/sarai.yaml")), env, &Overrides::default())
}

fn accepted_in(text: &str, env: &Env) -> Resolved {
    parse_in(text, env).unwrap_or_else(|error| panic!("{error}"))
}

fn accepted(text: &str) -> Resolved {
    accepted_in(text, &Env::default())
}

fn problems_in(text: &str, env: &Env) -> Vec<Problem> {
    match parse_in(text, env) {
        Ok(_) => panic!("accepted:\n{text}"),
        Err(error) => error.problems,
    }
}

fn problems(text: &str) -> Vec<Problem> {
    problems_in(text, &Env::default())
}

/// The only problem of `text`, as `path: message`.
fn problem(text: &str) -> String {
    let problems = problems(text);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    format!("{}: {}", problems[0].path, problems[0].message)
}

fn env(process: &[(&str, &str)], dotenv: &[(&str, &str)]) -> Env {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    Env::new(map(process), map(dotenv))
}

fn model<'a>(resolved: &'a Resolved, name: &str) -> &'a ModelConfig {
    &resolved.config.models[&name.parse().expect("a name")]
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

//! A loaded configuration with what led to it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::Value;

use super::sources::Source;
use super::values::Span;
use super::{Config, Problem};

/// A checked configuration, and where each of its settings comes from.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The configuration.
    pub config: Config,
    /// What works, but deserves the user's attention, in the file's order.
    pub warnings: Vec<Problem>,
    /// Every effective setting by its path, such as `memory.max_ram_gb`.
    pub settings: BTreeMap<String, Setting>,
}

/// The effective value of a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The value as the file would write it; `(hidden)` for a secret.
    pub value: String,
    /// Where it comes from.
    pub source: Source,
}

impl Setting {
    /// The setting at `path`, hidden if the path or a variable that gave the value is named like a secret.
    pub(super) fn new(path: &str, value: &impl Serialize, source: Source) -> Self {
        let secret_variable = match &source {
            Source::Variable(variable) => is_secret_variable(&variable.name),
            Source::File { variables, .. } => {
                variables.iter().any(|variable| is_secret_variable(&variable.name))
            }
            Source::Flag(_) | Source::Default => false,
        };
        let value = if secret_variable || is_secret_key(path) {
            "(hidden)".to_owned()
        } else {
            serde_json::to_value(value).map_or_else(|error| format!("({error})"), |value| as_yaml(&value))
        };
        Self { value, source }
    }
}

impl Resolved {
    /// One line per setting, by path: `memory.max_ram_gb: 12  # file config/sarai.yaml:30`. Secrets are hidden.
    #[must_use]
    pub fn render_resolved(&self) -> String {
        let mut out = String::new();
        for (path, Setting { value, source }) in &self.settings {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{path}: {value}  # {source}");
        }
        out
    }
}

/// Whether the key at the end of a path is that of a secret: `api_key`, `token`. The last word decides, so that
/// `max_tokens` and `first_token_timeout` are none.
pub(super) fn is_secret_key(path: &str) -> bool {
    let key = path.rsplit('.').next().unwrap_or(path).to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| key.ends_with(word))
}

/// Whether a variable is named like a secret. Any part of the name decides: nothing is known of its value.
pub(super) fn is_secret_variable(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| name.contains(word))
}

const SECRET_WORDS: [&str; 4] = ["key", "token", "password", "secret"];

/// A value on one line of YAML. Whole numbers have no decimals, and text has quotes only where it needs them.
fn as_yaml(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => float.to_string(),
            _ => number.to_string(),
        },
        Value::String(text) if is_plain(text) => text.clone(),
        Value::String(_) => value.to_string(),
        Value::Array(items) => format!("[{}]", items.iter().map(as_yaml).collect::<Vec<_>>().join(", ")),
        Value::Object(entries) => {
            let entries: Vec<_> =
                entries.iter().map(|(key, value)| format!("{key}: {}", as_yaml(value))).collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

/// Whether text stays the same text in YAML without quotes, in lists too. Some that would is quoted all the same.
fn is_plain(text: &str) -> bool {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | ':');
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && !text.ends_with(':')
        && !matches!(text.to_ascii_lowercase().as_str(), "true" | "false" | "null");
    text.chars().all(safe) && (is_word || Span::parse(text).is_some())
}

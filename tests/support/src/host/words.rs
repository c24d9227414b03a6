//! The words of an answer in the form that each protocol gives them.

use serde_json::{Value, json};

use super::Behaviour;

/// What is left to say where the request brings the beginning of its answer: as its last message, or at its prompt's end.
pub(super) fn left(words: &[String], body: &Value) -> Vec<String> {
    let whole = words.concat();
    let last = body["messages"].as_array().and_then(|messages| messages.last());
    let said = match last.filter(|message| message["role"] == "assistant") {
        Some(message) => message["content"].as_str().unwrap_or_default().to_owned(),
        None => {
            let prompt = body["prompt"].as_str().unwrap_or_default();
            let ends = (1..=whole.len()).rev().filter(|end| whole.is_char_boundary(*end));
            ends.map(|end| &whole[..end]).find(|said| prompt.ends_with(said)).unwrap_or("").to_owned()
        }
    };
    if !whole.starts_with(&said) {
        return words.to_vec();
    }
    let mut skip = said.len();
    let left = words.iter().filter_map(|word| {
        let skipped = skip.min(word.len());
        skip -= skipped;
        (skipped < word.len()).then(|| word[skipped..].to_owned())
    });
    left.collect()
}

/// A protocol's form of an answer.
pub(super) enum Form<'a> {
    Chat(&'a Value),
    Generate(&'a Value),
    OpenaiChat,
    OpenaiText,
}

impl<'a> Form<'a> {
    pub(super) fn of(path: &str, model: &'a Value) -> Self {
        match path {
            "/api/chat" => Self::Chat(model),
            "/api/generate" => Self::Generate(model),
            "/v1/chat/completions" => Self::OpenaiChat,
            _ => Self::OpenaiText,
        }
    }

    pub(super) fn content_type(&self) -> &'static str {
        match self {
            Self::Chat(_) | Self::Generate(_) => "application/x-ndjson",
            Self::OpenaiChat | Self::OpenaiText => "text/event-stream",
        }
    }

    pub(super) fn word(&self, word: &str) -> String {
        self.line(&match self {
            Self::Chat(model) => {
                json!({"model": model, "message": {"role": "assistant", "content": word}, "done": false})
            }
            Self::Generate(model) => json!({"model": model, "response": word, "done": false}),
            Self::OpenaiChat => {
                json!({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": null}]})
            }
            Self::OpenaiText => json!({"choices": [{"index": 0, "text": word, "finish_reason": null}]}),
        })
    }

    pub(super) fn error(&self, message: &str) -> String {
        self.line(&match self {
            Self::Chat(_) | Self::Generate(_) => json!({"error": message}),
            Self::OpenaiChat | Self::OpenaiText => json!({"error": {"message": message, "code": 500}}),
        })
    }

    /// A call of a tool, in the pieces in which it comes.
    pub(super) fn calls(&self) -> Vec<String> {
        let arguments = json!({"city": "Madrid"});
        match self {
            Self::Chat(model) | Self::Generate(model) => {
                let call = json!({"function": {"name": "weather", "arguments": arguments}});
                vec![self.line(
                    &json!({"model": model, "message": {"role": "assistant", "content": "", "tool_calls": [call]}}),
                )]
            }
            Self::OpenaiChat | Self::OpenaiText => {
                let part = |function: Value| {
                    let call = json!({"index": 0, "id": "call_1", "type": "function", "function": function});
                    self.line(&json!({"choices": [{"delta": {"tool_calls": [call]}}]}))
                };
                let text = arguments.to_string();
                let (first, second) = text.split_at(5);
                vec![
                    part(json!({"name": "weather", "arguments": ""})),
                    part(json!({"arguments": first})),
                    part(json!({"arguments": second})),
                ]
            }
        }
    }

    /// The lines that end an answer of so many words.
    pub(super) fn end(&self, words: usize, behaviour: &Behaviour) -> Vec<String> {
        let odd = *behaviour == Behaviour::OddNumbers;
        let number = |n: u64| if odd { json!(n.to_string()) } else { json!(n) };
        match self {
            Self::Chat(model) | Self::Generate(model) => vec![self.line(&json!({
                "model": model, "done": true, "done_reason": "stop", "load_duration": 5_000_000_u64,
                "prompt_eval_count": number(7), "eval_count": number(words as u64),
                "eval_duration": number(2_000_000_000), "something_new": {"a": [1]}
            }))],
            Self::OpenaiChat | Self::OpenaiText => {
                let reason = if *behaviour == Behaviour::Calls { "tool_calls" } else { "stop" };
                let finish =
                    json!({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": reason}]});
                let usage = json!({"choices": [], "usage": {
                    "prompt_tokens": number(7), "completion_tokens": number(words as u64),
                    "prompt_tokens_details": {"cached_tokens": number(3)}, "something_new": null
                }});
                vec![self.line(&finish), self.line(&usage), "data: [DONE]\n".to_owned()]
            }
        }
    }

    /// The last word in the line that ends the answer.
    pub(super) fn last_word(&self, word: &str, end: &str) -> String {
        let mut end: Value = serde_json::from_str(end.trim_start_matches("data:").trim()).unwrap_or_default();
        match self {
            Self::Chat(_) => end["message"] = json!({"role": "assistant", "content": word}),
            Self::Generate(_) => end["response"] = json!(word),
            Self::OpenaiChat => end["choices"][0]["delta"] = json!({"content": word}),
            Self::OpenaiText => end["choices"][0]["text"] = json!(word),
        }
        self.line(&end)
    }

    fn line(&self, object: &Value) -> String {
        match self {
            Self::Chat(_) | Self::Generate(_) => object.to_string(),
            // An event's end is an empty line.
            Self::OpenaiChat | Self::OpenaiText => format!("data: {object}\n"),
        }
    }
}

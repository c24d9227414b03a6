//! Tools: how a model says that it calls one, and how that is told from text. The formats are those of the families of
//! models that people run locally; which one a model speaks is seen from its chat template.

use sarai_core::request::{Tool, ToolCall};
use serde_json::{Map, Value};

use crate::text::overlap;

/// How a model writes its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, once for each call: Hermes, Qwen, and those that are
    /// told so by [`instructions`].
    Hermes,
    /// `<|tool_call_start|>[f(a="x"), g()]<|tool_call_end|>`: LFM2.
    Pythonic,
    /// `[TOOL_CALLS][{"name": "f", "arguments": {...}}]`: Mistral.
    Mistral,
    /// The whole answer is `{"name": "f", "parameters": {...}}`, after `<|python_tag|>` or nothing: Llama 3.
    Llama3,
}

impl Format {
    /// The format that a chat template speaks; `None` where it knows nothing of tools.
    pub(super) fn of(template: &str) -> Option<Self> {
        let has = |text| template.contains(text);
        match () {
            () if !has("tools") => None,
            () if has("<|tool_call_start|>") || has("<|tool_list_start|>") => Some(Self::Pythonic),
            () if has("[TOOL_CALLS]") => Some(Self::Mistral),
            () if has("<|python_tag|>") || has("\"parameters\":") && !has("<tool_call>") => {
                Some(Self::Llama3)
            }
            () => Some(Self::Hermes),
        }
    }

    const fn start(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Pythonic => "<|tool_call_start|>",
            Self::Mistral => "[TOOL_CALLS]",
            Self::Llama3 => "<|python_tag|>",
        }
    }

    /// What closes calls.
    const fn end(self) -> &'static str {
        match self {
            Self::Hermes => "</tool_call>",
            Self::Pythonic => "<|tool_call_end|>",
            Self::Mistral | Self::Llama3 => "",
        }
    }

    /// The calls in a text that begins with [`start`](Self::start), or for Llama 3 with a brace, and the text between and
    /// after them; `None` where it is no such thing after all.
    fn parse(self, text: &str) -> Option<(Vec<ToolCall>, String)> {
        let (mut calls, mut besides) = (Vec::new(), String::new());
        let mut rest = text;
        while let Some((between, after)) = rest.split_once(self.start()) {
            besides.push_str(between);
            rest = self.block(after, &mut calls)?;
        }
        if calls.is_empty() && self == Self::Llama3 {
            rest = self.block(rest, &mut calls)?;
        }
        besides.push_str(rest);
        Some((calls, besides.trim().to_owned()))
    }

    /// Reads what follows on a start, up to its end or as far as it goes, and gives the rest.
    fn block<'t>(self, text: &'t str, calls: &mut Vec<ToolCall>) -> Option<&'t str> {
        match self {
            Self::Hermes => {
                let (inside, rest) = text.split_once(self.end()).unwrap_or((text, ""));
                calls.push(call(serde_json::from_str(inside.trim()).ok()?, "arguments")?);
                Some(rest)
            }
            Self::Pythonic => {
                let (inside, rest) = text.split_once(self.end()).unwrap_or((text, ""));
                calls.extend(python::calls(inside)?);
                Some(rest)
            }
            Self::Mistral => {
                let (Value::Array(list), rest) = json_value(text)? else { return None };
                for one in list {
                    calls.push(call(one, "arguments")?);
                }
                Some(rest)
            }
            Self::Llama3 => {
                let mut rest = text;
                loop {
                    let (one, after) = json_value(rest)?;
                    calls.push(call(one, "parameters")?);
                    match after.trim_start().strip_prefix(';') {
                        Some(next) if next.trim_start().starts_with('{') => rest = next,
                        Some(after) => return Some(after),
                        None => return Some(after),
                    }
                }
            }
        }
    }
}

/// Instructions for a model whose template knows nothing of tools.
pub(super) fn instructions(tools: &[Tool]) -> String {
    let list: Vec<String> = tools.iter().map(|tool| described(tool).to_string()).collect();
    format!(
        "You may call these functions:\n<tools>\n{}\n</tools>\nTo call one, answer with its name and arguments alone:\n\
         <tool_call>\n{{\"name\": \"...\", \"arguments\": {{...}}}}\n</tool_call>",
        list.join("\n")
    )
}

/// A tool as chat templates expect it.
pub(super) fn described(tool: &Tool) -> Value {
    serde_json::json!({
        "type": "function",
        "function": { "name": tool.name, "description": tool.description, "parameters": tool.parameters },
    })
}

/// Takes the calls out of an answer as it comes.
#[derive(Debug)]
pub(super) struct Calls {
    format: Format,
    /// From the beginning of what may be a call.
    held: String,
    /// Whether text has been shown: from then on a brace begins no call.
    shown: bool,
}

impl Calls {
    pub(super) fn new(format: Format) -> Self {
        Self { format, held: String::new(), shown: false }
    }

    /// Adds text and takes what is no call.
    pub(super) fn push(&mut self, text: &str) -> String {
        self.held.push_str(text);
        let whole_answer = self.format == Format::Llama3 && !self.shown;
        if whole_answer && (self.held.trim_start().is_empty() || self.held.trim_start().starts_with('{')) {
            return String::new();
        }
        let start = self.format.start();
        let keep_from = match self.held.find(start) {
            Some(at) => at,
            None => self.held.len() - overlap(&self.held, start),
        };
        let shown: String = self.held.drain(..keep_from).collect();
        self.shown |= !shown.is_empty();
        shown
    }

    /// Nothing more comes: the calls, and what turned out to be text.
    pub(super) fn finish(&mut self) -> (Vec<ToolCall>, String) {
        let held = std::mem::take(&mut self.held);
        let begins = held.trim_start().starts_with(self.format.start())
            || self.format == Format::Llama3 && !self.shown && held.trim_start().starts_with('{');
        match begins.then(|| self.format.parse(held.trim())).flatten() {
            Some((calls, besides)) if !calls.is_empty() => (calls, besides),
            _ => (Vec::new(), held),
        }
    }
}

/// The JSON value that a text begins with, and the text after it.
fn json_value(text: &str) -> Option<(Value, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter();
    let value = values.next()?.ok()?;
    Some((value, &text[values.byte_offset()..]))
}

/// `{"name": ..., <arguments>: {...}}`; some models write the arguments as a text that holds JSON.
fn call(value: Value, arguments: &str) -> Option<ToolCall> {
    let Value::Object(mut fields) = value else { return None };
    let Some(Value::String(name)) = fields.remove("name") else { return None };
    let arguments = match fields.remove(arguments) {
        Some(Value::Object(arguments)) => arguments,
        Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
        None => Map::new(),
        Some(_) => return None,
    };
    Some(ToolCall { name, arguments })
}

/// `[f(a="x", b=[1, 2]), g()]`: Python's calls with literal arguments.
mod python {
    use sarai_core::request::ToolCall;
    use serde_json::{Map, Value};

    /// How deep lists may be nested.
    const DEEPEST: usize = 32;

    pub(super) fn calls(text: &str) -> Option<Vec<ToolCall>> {
        let mut rest = Reader { rest: text.trim() };
        let listed = rest.take("[");
        let mut calls = Vec::new();
        loop {
            if listed && rest.take("]") || rest.rest.is_empty() {
                return rest.rest.trim().is_empty().then_some(calls);
            }
            calls.push(rest.call()?);
            rest.take(",");
        }
    }

    struct Reader<'t> {
        rest: &'t str,
    }

    impl<'t> Reader<'t> {
        fn take(&mut self, text: &str) -> bool {
            let Some(rest) = self.rest.trim_start().strip_prefix(text) else { return false };
            self.rest = rest.trim_start();
            true
        }

        fn name(&mut self) -> Option<&'t str> {
            let part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '-');
            let end = self.rest.find(|c| !part(c)).unwrap_or(self.rest.len());
            let (name, rest) = self.rest.split_at(end);
            self.rest = rest.trim_start();
            (!name.is_empty()).then_some(name)
        }

        fn call(&mut self) -> Option<ToolCall> {
            let name = self.name()?.to_owned();
            let mut arguments = Map::new();
            if !self.take("(") {
                return None;
            }
            while !self.take(")") {
                let key = self.name()?;
                if !self.take("=") {
                    return None;
                }
                arguments.insert(key.to_owned(), self.value(DEEPEST)?);
                if !self.take(",") && !self.rest.starts_with(')') {
                    return None;
                }
            }
            Some(ToolCall { name, arguments })
        }

        fn value(&mut self, depth: usize) -> Option<Value> {
            let depth = depth.checked_sub(1)?;
            match self.rest.chars().next()? {
                quote @ ('"' | '\'') => self.text(quote).map(Value::String),
                '[' => {
                    self.take("[");
                    let mut items = Vec::new();
                    while !self.take("]") {
                        items.push(self.value(depth)?);
                        if !self.take(",") && !self.rest.starts_with(']') {
                            return None;
                        }
                    }
                    Some(Value::Array(items))
                }
                '{' => {
                    self.take("{");
                    let mut fields = Map::new();
                    while !self.take("}") {
                        let quote = self.rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
                        let key = self.text(quote)?;
                        if !self.take(":") {
                            return None;
                        }
                        fields.insert(key, self.value(depth)?);
                        if !self.take(",") && !self.rest.starts_with('}') {
                            return None;
                        }
                    }
                    Some(Value::Object(fields))
                }
                _ => match self.name_or_number()? {
                    "True" | "true" => Some(Value::Bool(true)),
                    "False" | "false" => Some(Value::Bool(false)),
                    "None" | "null" => Some(Value::Null),
                    number => serde_json::from_str(number).ok().filter(Value::is_number),
                },
            }
        }

        fn name_or_number(&mut self) -> Option<&'t str> {
            let part = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '+');
            let end = self.rest.find(|c| !part(c)).unwrap_or(self.rest.len());
            let (word, rest) = self.rest.split_at(end);
            self.rest = rest.trim_start();
            Some(word)
        }

        fn text(&mut self, quote: char) -> Option<String> {
            let mut text = String::new();
            let mut characters = self.rest[quote.len_utf8()..].char_indices();
            while let Some((at, c)) = characters.next() {
                match c {
                    '\\' => text.push(match characters.next()?.1 {
                        'n' => '\n',
                        't' => '\t',
                        'r' => '\r',
                        other => other,
                    }),
                    c if c == quote => {
                        self.rest = self.rest[quote.len_utf8() + at + c.len_utf8()..].trim_start();
                        return Some(text);
                    }
                    c => text.push(c),
                }
            }
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What is shown and what is called, for an answer that comes in pieces of `n` characters.
    fn read(format: Format, answer: &str, n: usize) -> (String, Vec<(String, Value)>) {
        let mut calls = Calls::new(format);
        let pieces: Vec<char> = answer.chars().collect();
        let mut shown: String =
            pieces.chunks(n).map(|piece| calls.push(&piece.iter().collect::<String>())).collect();
        let (called, rest) = calls.finish();
        shown.push_str(&rest);
        (shown, called.into_iter().map(|call| (call.name, Value::Object(call.arguments))).collect())
    }

    #[test]
    fn calls_are_found_in_every_format_however_the_text_is_cut() {
        let weather = ("weather".to_owned(), json!({ "city": "Alcalá", "days": 3 }));
        let answers = [
            (
                Format::Hermes,
                "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Alcalá\", \"days\": 3}}\n</tool_call>",
            ),
            (Format::Pythonic, "<|tool_call_start|>[weather(city=\"Alcalá\", days=3)]<|tool_call_end|>"),
            (
                Format::Mistral,
                "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Alcalá\", \"days\": 3}}]",
            ),
            (Format::Llama3, "{\"name\": \"weather\", \"parameters\": {\"city\": \"Alcalá\", \"days\": 3}}"),
            (
                Format::Llama3,
                "<|python_tag|>{\"name\": \"weather\", \"parameters\": {\"city\": \"Alcalá\", \"days\": 3}}",
            ),
        ];
        for (format, answer) in answers {
            for n in [1, 2, 5, 200] {
                assert_eq!(
                    read(format, answer, n),
                    (String::new(), vec![weather.clone()]),
                    "{format:?} by {n}"
                );
            }
        }
    }

    #[test]
    fn text_before_a_call_is_shown_and_several_calls_keep_their_order() {
        let answer = "Let me see. <tool_call>{\"name\": \"a\"}</tool_call>\n<tool_call>{\"name\": \"b\", \"arguments\": \"{\\\"x\\\": 1}\"}</tool_call>";
        let (shown, calls) = read(Format::Hermes, answer, 3);
        assert_eq!(shown, "Let me see. ");
        assert_eq!(calls, [("a".to_owned(), json!({})), ("b".to_owned(), json!({ "x": 1 }))]);
    }

    #[test]
    fn text_between_and_after_calls_is_kept() {
        let named =
            |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), json!({}))).collect::<Vec<_>>();
        for (format, answer, text, calls) in [
            (
                Format::Pythonic,
                "<|tool_call_start|>[f()]<|tool_call_end|>Checking now.",
                "Checking now.",
                ["f"].as_slice(),
            ),
            (
                Format::Pythonic,
                "<|tool_call_start|>[f()]<|tool_call_end|> and <|tool_call_start|>[g(), h()]<|tool_call_end|>",
                "and",
                &["f", "g", "h"],
            ),
            (
                Format::Hermes,
                "<tool_call>{\"name\": \"f\"}</tool_call>\nthen\n<tool_call>{\"name\": \"g\"}</tool_call> done",
                "then\n done",
                &["f", "g"],
            ),
            (Format::Mistral, "[TOOL_CALLS] [{\"name\": \"f\"}] done", "done", &["f"]),
            (Format::Llama3, "{\"name\": \"f\"}; {\"name\": \"g\"}", "", &["f", "g"]),
        ] {
            for n in [1, 3, 200] {
                assert_eq!(read(format, answer, n), (text.to_owned(), named(calls)), "{format:?} by {n}");
            }
        }
        let (_, calls) = read(Format::Llama3, "{\"name\": \"f\", \"parameters\": {\"q\": \"a;b\"}}", 4);
        assert_eq!(calls, [("f".to_owned(), json!({ "q": "a;b" }))]);
    }

    #[test]
    fn what_only_looks_like_a_call_is_text_and_nothing_of_it_is_lost() {
        for (format, answer) in [
            (Format::Hermes, "1 <too 2 <tool_call> not json"),
            (Format::Pythonic, "<|tool_call_start|>[weather(city=]"),
            (Format::Mistral, "[TOOL_CALLS] none"),
            (Format::Llama3, "{\"answer\": 42}"),
            (Format::Llama3, "Use braces: {\"name\": \"x\"}"),
        ] {
            assert_eq!(read(format, answer, 2), (answer.to_owned(), vec![]), "{format:?}");
        }
    }

    #[test]
    fn pythons_literals_are_read() {
        let answer = "<|tool_call_start|>[f(a='it\\'s', b=[1, -2.5e3, True, None], c={\"k\": \"v\"}), g.h()]<|tool_call_end|>";
        let (_, calls) = read(Format::Pythonic, answer, 7);
        let f = json!({ "a": "it's", "b": [1, -2500.0, true, null], "c": { "k": "v" } });
        assert_eq!(calls, [("f".to_owned(), f), ("g.h".to_owned(), json!({}))]);
        let deep = format!("<|tool_call_start|>[f(a={})]", "[".repeat(10_000));
        assert!(read(Format::Pythonic, &deep, 4096).1.is_empty());
    }

    #[test]
    fn a_templates_format_is_seen_from_its_words() {
        assert_eq!(Format::of("{{ messages }}"), None);
        assert_eq!(Format::of("{% if tools %}<|tool_list_start|>"), Some(Format::Pythonic));
        assert_eq!(Format::of("{% if tools %}[AVAILABLE_TOOLS] [TOOL_CALLS]"), Some(Format::Mistral));
        assert_eq!(Format::of("{% if tools %}<|python_tag|>"), Some(Format::Llama3));
        assert_eq!(Format::of("{% if tools %}<tool_call>"), Some(Format::Hermes));
    }
}

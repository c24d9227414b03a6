use std::collections::BTreeMap;
use std::time::Instant;

use sarai_core::request::{Completion, Delta, FinishReason};

use super::wire::{Chunk, Usage, said, tool_call};
use crate::Error;
use crate::remote::{Answer, Deltas, Lines, cut, shown};

/// A response's events (server-sent, one JSON object in each `data:` line) as an answer's deltas. A finish reason is an answer's
/// end; the counts of tokens and `[DONE]` may follow.
pub(super) fn tokens(lines: Lines) -> Deltas {
    Events { lines, calls: BTreeMap::new(), finish: None, usage: None, first: None, last: None }.deltas()
}

struct Events {
    lines: Lines,
    /// Name and arguments of each call, as far as they have come.
    calls: BTreeMap<usize, (String, String)>,
    finish: Option<FinishReason>,
    usage: Option<Usage>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Answer for Events {
    fn lines(&mut self) -> &mut Lines {
        &mut self.lines
    }

    async fn next(&mut self) -> Result<Delta, Error> {
        loop {
            let line = match (self.lines.next().await, self.finish) {
                (Ok(Some(line)), _) => line,
                // What may come after the finish is not worth an error.
                (Ok(None) | Err(_), Some(finish)) => return self.end(finish),
                (Ok(None), None) => {
                    return Err(Error::CutOff { host: self.lines.host().clone(), source: None });
                }
                (Err(error), None) => return Err(error),
            };
            let Some(data) = data(&line) else {
                if is_field(&line) {
                    continue;
                }
                return Err(self.unexpected(shown(&line)));
            };
            if data == b"[DONE]" {
                return match self.finish {
                    Some(finish) => self.end(finish),
                    None => Err(self.unexpected("[DONE] before a finish reason".to_owned())),
                };
            }
            let text = match (self.text(data), self.finish) {
                (Err(_), Some(finish)) => return self.end(finish),
                (text, _) => text?,
            };
            if !text.is_empty() {
                let now = Instant::now();
                self.first.get_or_insert(now);
                self.last = Some(now);
                return Ok(Delta::Text(text));
            }
        }
    }
}

impl Events {
    /// The text of an event.
    fn text(&mut self, data: &[u8]) -> Result<String, Error> {
        let Ok(chunk) = serde_json::from_slice::<Chunk>(data) else {
            return Err(self.unexpected(shown(data)));
        };
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            return Err(Error::HostReported { host: self.lines.host().clone(), message: cut(&said(&error)) });
        }
        self.usage = chunk.usage.or_else(|| self.usage.take());
        // One answer was asked for.
        let Some(choice) = chunk.choices.into_iter().next() else { return Ok(String::new()) };
        if let Some(reason) = choice.finish_reason {
            self.finish = Some(if reason == "length" { FinishReason::Length } else { FinishReason::Stop });
        }
        let Some(delta) = choice.delta else { return Ok(choice.text.unwrap_or_default()) };
        for part in delta.tool_calls {
            let (name, arguments) = self.calls.entry(part.index).or_default();
            name.push_str(&part.function.name.unwrap_or_default());
            arguments.push_str(&part.function.arguments.unwrap_or_default());
        }
        Ok(delta.content.unwrap_or_default())
    }

    fn end(&mut self, finish: FinishReason) -> Result<Delta, Error> {
        let calls = std::mem::take(&mut self.calls).into_values();
        let calls = calls.map(|(name, arguments)| tool_call(name, &arguments)).collect::<Result<Vec<_>, _>>();
        let tool_calls = calls.map_err(|what| self.unexpected(what))?;
        let usage = self.usage.take();
        let count = |of: fn(&Usage) -> Option<u32>| usage.as_ref().and_then(of);
        let completion_tokens = count(|usage| usage.completion_tokens);
        Ok(Delta::Done(Completion {
            prompt_tokens: count(|usage| usage.prompt_tokens),
            cached_tokens: count(|usage| usage.prompt_tokens_details.as_ref()?.cached_tokens),
            completion_tokens,
            decode_time: self.decode_time(completion_tokens),
            tool_calls: tool_calls.clone(),
            ..Completion::new(if tool_calls.is_empty() { finish } else { FinishReason::ToolCalls })
        }))
    }

    /// The mean time between two tokens, times their number, as they came here.
    fn decode_time(&self, tokens: Option<u32>) -> Option<std::time::Duration> {
        let between = self.last?.duration_since(self.first?);
        let tokens = tokens?;
        let intervals = tokens.checked_sub(1).filter(|intervals| *intervals > 0)?;
        Some(between / intervals * tokens)
    }

    fn unexpected(&self, what: String) -> Error {
        Error::Protocol { host: self.lines.host().clone(), what }
    }
}

/// What a line carries.
fn data(line: &[u8]) -> Option<&[u8]> {
    Some(line.strip_prefix(b"data:")?.trim_ascii())
}

/// A comment, or a field that says nothing here.
fn is_field(line: &[u8]) -> bool {
    [&b":"[..], b"event:", b"id:", b"retry:"].iter().any(|field| line.starts_with(field))
}

use std::time::Duration;

use sarai_core::request::{Completion, Delta, FinishReason, ToolCall};

use super::wire::Line;
use crate::Error;
use crate::remote::{Answer, Deltas, Lines, cut, shown};

/// A response's lines as an answer's deltas. `done: true` alone is its end.
pub(super) fn tokens(lines: Lines) -> Deltas {
    Replies { lines, calls: Vec::new(), done: None }.deltas()
}

struct Replies {
    lines: Lines,
    /// Tools that the model has called so far.
    calls: Vec<ToolCall>,
    /// The end, once it has come and while its text goes before it.
    done: Option<Completion>,
}

impl Answer for Replies {
    fn lines(&mut self) -> &mut Lines {
        &mut self.lines
    }

    async fn next(&mut self) -> Result<Delta, Error> {
        loop {
            if let Some(completion) = self.done.take() {
                return Ok(Delta::Done(completion));
            }
            let Some(line) = self.lines.next().await? else {
                return Err(Error::CutOff { host: self.lines.host().clone(), source: None });
            };
            let text = self.text(&line)?;
            if !text.is_empty() {
                return Ok(Delta::Text(text));
            }
        }
    }
}

impl Replies {
    /// The text of a line, which may be the last one.
    fn text(&mut self, line: &[u8]) -> Result<String, Error> {
        let Ok(mut line) = serde_json::from_slice::<Line>(line) else {
            return Err(self.unexpected(shown(line)));
        };
        if let Some(message) = line.error.take() {
            return Err(Error::HostReported { host: self.lines.host().clone(), message: cut(&message) });
        }
        if matches!(line.done_reason.as_deref(), Some("load" | "unload")) {
            return Err(self.unexpected("a load instead of an answer".to_owned()));
        }
        if let Some(message) = &mut line.message {
            self.calls.extend(message.tool_calls.drain(..).map(|call| call.function));
        }
        if line.done {
            let completion = completion(&line);
            let tool_calls = std::mem::take(&mut self.calls);
            let finish_reason =
                if tool_calls.is_empty() { completion.finish_reason } else { FinishReason::ToolCalls };
            self.done = Some(Completion { finish_reason, tool_calls, ..completion });
        }
        Ok(line.message.map(|message| message.content).or(line.response).unwrap_or_default())
    }

    fn unexpected(&self, what: String) -> Error {
        Error::Protocol { host: self.lines.host().clone(), what }
    }
}

fn completion(line: &Line) -> Completion {
    let finish_reason = match line.done_reason.as_deref() {
        Some("length") => FinishReason::Length,
        _ => FinishReason::Stop,
    };
    // Whether it cut the prompt, the host does not say.
    Completion {
        prompt_tokens: line.prompt_eval_count,
        completion_tokens: line.eval_count,
        decode_time: line.eval_duration.map(Duration::from_nanos),
        ..Completion::new(finish_reason)
    }
}

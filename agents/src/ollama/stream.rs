use std::collections::VecDeque;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::Response;
use sarai_core::request::{Completion, Delta, FinishReason, TokenStream, ToolCall};
use sarai_core::units::HostName;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::wire::Line;
use crate::Error;
use crate::error::Stage;

/// The longest line that is believed: what Ollama's own client takes.
const LONGEST_LINE: usize = 8 << 20;

/// When a request's stages have to be over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines {
    pub(super) first: Instant,
    pub(super) stall: Duration,
    pub(super) total: Instant,
    /// The first and the last as they were set, for errors.
    pub(super) limits: (Duration, Duration),
}

impl Deadlines {
    /// One deadline for everything.
    pub(super) fn within(limit: Duration) -> Self {
        let end = Instant::now() + limit;
        Self { first: end, stall: limit, total: end, limits: (limit, limit) }
    }

    pub(super) fn until_first(&self) -> Instant {
        self.first.min(self.total)
    }
}

/// A body's bytes as they come, each piece within its deadline.
struct Pieces {
    host: HostName,
    bytes: BoxStream<'static, reqwest::Result<Vec<u8>>>,
    deadlines: Deadlines,
    begun: bool,
}

impl Pieces {
    fn new(host: HostName, response: Response, deadlines: Deadlines) -> Self {
        let bytes = response.bytes_stream().map(|piece| piece.map(|bytes| bytes.to_vec())).boxed();
        Self { host, bytes, deadlines, begun: false }
    }

    async fn drain(&mut self) {
        // Nothing of it matters any more; without its end the connection is closed instead.
        let _end = tokio::time::timeout(REUSE_GRACE, self.bytes.next()).await;
    }

    async fn next(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let Deadlines { first, stall, total, limits } = self.deadlines;
        let (stage, limit, until) = if self.begun {
            (Stage::Stall, stall, Instant::now() + stall)
        } else {
            (Stage::FirstToken, limits.0, first)
        };
        let piece = tokio::time::timeout_at(until.min(total), self.bytes.next()).await.map_err(|_| {
            let (stage, limit) = if total <= until { (Stage::Total, limits.1) } else { (stage, limit) };
            Error::Deadline { host: self.host.clone(), stage, limit }
        })?;
        self.begun = true;
        // Whatever breaks a body on its way, the rest of it is missing.
        piece.transpose().map_err(|source| Error::CutOff { host: self.host.clone(), source: Some(source) })
    }
}

/// How long the body's own end is waited for after the answer's, so that the connection can be used again.
const REUSE_GRACE: Duration = Duration::from_millis(20);

/// A whole body, if it is no longer than `longest`.
pub(super) async fn collect(
    host: &HostName,
    response: Response,
    deadlines: &Deadlines,
    longest: usize,
) -> Result<Vec<u8>, Error> {
    let mut pieces = Pieces::new(host.clone(), response, *deadlines);
    let mut body = Vec::new();
    while let Some(piece) = pieces.next().await? {
        body.extend(piece);
        if body.len() > longest {
            let what = format!("an answer of more than {longest} bytes");
            return Err(Error::NotOllama { host: host.clone(), what });
        }
    }
    Ok(body)
}

/// A response's lines as an answer's deltas. `done: true` alone is its end; the host's place is free when the stream
/// is dropped.
pub(super) fn tokens(
    host: HostName,
    response: Response,
    deadlines: Deadlines,
    running: OwnedSemaphorePermit,
) -> TokenStream {
    let answer = AnswerLines {
        host: host.clone(),
        pieces: Pieces::new(host, response, deadlines),
        splitter: Splitter::default(),
        lines: VecDeque::new(),
        calls: Vec::new(),
        done: None,
        ended: false,
        _running: running,
    };
    Box::pin(futures::stream::unfold(answer, |mut answer| async move {
        let next = answer.next().await?;
        Some((next.map_err(Into::into), answer))
    }))
}

struct AnswerLines {
    host: HostName,
    pieces: Pieces,
    splitter: Splitter,
    lines: VecDeque<Vec<u8>>,
    /// The end, once it has come and while its text goes before it.
    /// Tools that the model has called so far.
    calls: Vec<ToolCall>,
    done: Option<Completion>,
    ended: bool,
    _running: OwnedSemaphorePermit,
}

impl AnswerLines {
    async fn next(&mut self) -> Option<Result<Delta, Error>> {
        while !self.ended {
            match self.step().await {
                Ok(Some(delta)) => {
                    if matches!(delta, Delta::Done(_)) {
                        self.ended = true;
                        self.pieces.drain().await;
                    }
                    return Some(Ok(delta));
                }
                Ok(None) => {}
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// Gives the end if it has come, takes a line if there is one, otherwise reads on.
    async fn step(&mut self) -> Result<Option<Delta>, Error> {
        if let Some(completion) = self.done.take() {
            return Ok(Some(Delta::Done(completion)));
        }
        if let Some(line) = self.lines.pop_front() {
            return self.delta(&line);
        }
        match self.pieces.next().await? {
            Some(piece) => {
                self.lines.extend(self.splitter.push(&piece));
                if self.splitter.held() > LONGEST_LINE {
                    return Err(self.not_ollama(format!("a line of more than {LONGEST_LINE} bytes")));
                }
                Ok(None)
            }
            // The last line may lack its end.
            None => match self.splitter.finish() {
                Some(line) => self.delta(&line),
                None => Err(Error::CutOff { host: self.host.clone(), source: None }),
            },
        }
    }

    fn delta(&mut self, line: &[u8]) -> Result<Option<Delta>, Error> {
        let Ok(mut line) = serde_json::from_slice::<Line>(line) else {
            let shown: String = String::from_utf8_lossy(line).trim().chars().take(200).collect();
            return Err(self.not_ollama(shown));
        };
        if let Some(message) = line.error.take() {
            return Err(Error::HostReported { host: self.host.clone(), message });
        }
        if matches!(line.done_reason.as_deref(), Some("load" | "unload")) {
            return Err(self.not_ollama("a load instead of an answer".to_owned()));
        }
        let done = line.done.then(|| completion(&line));
        if let Some(message) = &mut line.message {
            self.calls.extend(message.tool_calls.drain(..).map(|call| call.function));
        }
        if let Some(completion) = done {
            let tool_calls = std::mem::take(&mut self.calls);
            let finish_reason =
                if tool_calls.is_empty() { completion.finish_reason } else { FinishReason::ToolCalls };
            self.done = Some(Completion { finish_reason, tool_calls, ..completion });
        }
        // The last line may bring the last text with it.
        let text = line.message.map(|message| message.content).or(line.response).unwrap_or_default();
        Ok(if text.is_empty() { self.done.take().map(Delta::Done) } else { Some(Delta::Text(text)) })
    }

    fn not_ollama(&self, what: String) -> Error {
        Error::NotOllama { host: self.host.clone(), what }
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

/// Cuts bytes into lines, wherever the pieces were cut.
#[derive(Debug, Default)]
struct Splitter {
    held: Vec<u8>,
}

impl Splitter {
    fn push(&mut self, piece: &[u8]) -> Vec<Vec<u8>> {
        // Only the new piece can hold a line's end.
        let Some(last) = piece.iter().rposition(|&byte| byte == b'\n') else {
            self.held.extend_from_slice(piece);
            return Vec::new();
        };
        self.held.extend_from_slice(&piece[..last]);
        let whole = std::mem::replace(&mut self.held, piece[last + 1..].to_vec());
        whole.split(|&byte| byte == b'\n').filter(|line| !is_blank(line)).map(<[u8]>::to_vec).collect()
    }

    fn held(&self) -> usize {
        self.held.len()
    }

    fn finish(&mut self) -> Option<Vec<u8>> {
        Some(std::mem::take(&mut self.held)).filter(|line| !is_blank(line))
    }
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_were_cut(
            lines in prop::collection::vec("[a-zñ😀]{1,9}", 0..6), cut in 1..7_usize, ended in any::<bool>()
        ) {
            let text = lines.join("\n") + if ended { "\n" } else { "" };
            let mut splitter = Splitter::default();
            let mut got: Vec<Vec<u8>> = text.as_bytes().chunks(cut).flat_map(|piece| splitter.push(piece)).collect();
            got.extend(splitter.finish());
            let expected: Vec<Vec<u8>> = lines.iter().map(|line| line.clone().into_bytes()).collect();
            prop_assert_eq!(got, expected);
        }
    }
}

//! A response's body as it comes: pieces within their deadlines, and the lines that they make.

use std::collections::VecDeque;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::Response;
use sarai_core::units::HostName;
use tokio::time::Instant;

use super::deadlines::Deadlines;
use crate::Error;
use crate::error::Stage;

/// The longest line that is believed: what Ollama's own client takes.
const LONGEST_LINE: usize = 8 << 20;

/// How long the body's own end is waited for after the answer's, so that the connection can be used again.
const REUSE_GRACE: Duration = Duration::from_millis(20);

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

    async fn next(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let Deadlines { first, stall, total, limits } = self.deadlines;
        let (stage, limit, until) = if self.begun {
            (Stage::Stall, stall, Instant::now() + stall)
        } else {
            (Stage::FirstToken, limits.0, first)
        };
        let piece = tokio::time::timeout_at(until.min(total), self.bytes.next()).await.map_err(|_| {
            let is_total = self.begun && total <= until;
            let (stage, limit) = if is_total { (Stage::Total, limits.1) } else { (stage, limit) };
            Error::Deadline { host: self.host.clone(), stage, limit }
        })?;
        self.begun = true;
        // Whatever breaks a body on its way, the rest of it is missing.
        piece.transpose().map_err(|source| Error::CutOff { host: self.host.clone(), source: Some(source) })
    }
}

/// A whole body, if it is no longer than `longest`.
pub(crate) async fn collect(
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
            return Err(Error::Protocol { host: host.clone(), what });
        }
    }
    Ok(body)
}

/// A body's lines that are not blank.
pub(crate) struct Lines {
    pieces: Pieces,
    splitter: Splitter,
    lines: VecDeque<Vec<u8>>,
}

impl Lines {
    pub(crate) fn new(host: HostName, response: Response, deadlines: Deadlines) -> Self {
        let pieces = Pieces::new(host, response, deadlines);
        Self { pieces, splitter: Splitter::default(), lines: VecDeque::new() }
    }

    pub(crate) fn host(&self) -> &HostName {
        &self.pieces.host
    }

    /// The next line; `None` at the body's end.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, Error> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Ok(Some(line));
            }
            let Some(piece) = self.pieces.next().await? else {
                // The last line may lack its end.
                return Ok(self.splitter.finish());
            };
            self.lines.extend(self.splitter.push(&piece));
            if self.splitter.held() > LONGEST_LINE {
                let what = format!("a line of more than {LONGEST_LINE} bytes");
                return Err(Error::Protocol { host: self.host().clone(), what });
            }
        }
    }

    /// Waits a little for the body's end, after the answer's.
    pub(crate) async fn drain(&mut self) {
        // Nothing of it matters any more; without its end the connection is closed instead.
        let _end = tokio::time::timeout(REUSE_GRACE, self.pieces.bytes.next()).await;
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

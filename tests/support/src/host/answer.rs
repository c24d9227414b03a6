//! Answers to requests for text and vectors, and the ways in which they go wrong.

use std::io;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::connection::{reply, send, wait_for_end};
use super::words::{self, Form};
use super::{Behaviour, State, lock};

/// A request for text or vectors on its way to being answered.
pub(super) struct Answer<'a> {
    pub(super) stream: &'a mut BufReader<TcpStream>,
    pub(super) state: &'a State,
    pub(super) path: &'a str,
    pub(super) body: &'a Value,
}

impl Answer<'_> {
    /// Answers; false if the connection is to be closed.
    pub(super) async fn give(mut self, behaviour: Behaviour) -> io::Result<bool> {
        match behaviour {
            Behaviour::Status(status, body) => {
                send(self.stream, status, "application/json", body.as_bytes(), "").await?;
                return Ok(true);
            }
            Behaviour::RetryAfter(status, seconds) => {
                let header = format!("retry-after: {seconds}\r\n");
                send(self.stream, status, "application/json", b"{\"error\": \"busy\"}", &header).await?;
                return Ok(true);
            }
            Behaviour::NoModel => {
                let error = json!({"error": format!("model {} not found", self.body["model"])});
                reply(self.stream, 404, &error).await?;
                return Ok(true);
            }
            Behaviour::StatusWithoutBody(status) => {
                let head = format!("HTTP/1.1 {status} x\r\ncontent-length: 100\r\n\r\n");
                self.stream.write_all(head.as_bytes()).await?;
                wait_for_end(self.stream).await?;
                return Ok(false);
            }
            Behaviour::Html => {
                send(self.stream, 200, "text/html", b"<html><body>Gateway</body></html>", "").await?;
                return Ok(true);
            }
            Behaviour::Redirect(to) => {
                send(self.stream, 302, "text/plain", b"", &format!("location: {to}\r\n")).await?;
                return Ok(true);
            }
            Behaviour::NoThinking if !self.body["think"].is_null() => {
                let error = json!({"error": "\"m\" does not support thinking"});
                reply(self.stream, 400, &error).await?;
                return Ok(true);
            }
            Behaviour::SlowFirstByte if !self.released().await => return Ok(false),
            Behaviour::Thinks(time) => tokio::time::sleep(time).await,
            _ => {}
        }
        lock(&self.state.memory).use_now(self.body["model"].as_str().unwrap_or_default());
        if matches!(self.path, "/api/embed" | "/v1/embeddings") {
            let inputs = self.body["input"].as_array().map_or(1, Vec::len);
            let vectors = (0..inputs).map(|n| [3.0, 4.0, n as f32 * 0.0]);
            let body = if self.path == "/api/embed" {
                json!({"embeddings": vectors.collect::<Vec<_>>(), "prompt_eval_count": inputs * 2})
            } else {
                // Not in the texts' order.
                let data = vectors.enumerate().map(|(n, vector)| json!({"index": n, "embedding": vector}));
                json!({"data": data.rev().collect::<Vec<_>>(), "usage": {"prompt_tokens": inputs * 2}})
            };
            reply(self.stream, 200, &body).await?;
            return Ok(true);
        }
        if self.path == "/v1/audio/transcriptions" {
            return self.transcribe(&behaviour).await;
        }
        self.stream_text(&behaviour).await
    }

    async fn transcribe(&mut self, behaviour: &Behaviour) -> io::Result<bool> {
        match behaviour {
            Behaviour::CutAfter(_) => {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
                self.stream.write_all(format!("{head}{{\"text\": \"ho").as_bytes()).await?;
                return Ok(false);
            }
            Behaviour::StallAfter(_) if !self.released().await => return Ok(false),
            _ => {}
        }
        let text = lock(&self.state.words).concat();
        reply(self.stream, 200, &json!({"text": format!(" {text}\n")})).await?;
        Ok(true)
    }

    async fn stream_text(&mut self, behaviour: &Behaviour) -> io::Result<bool> {
        let words = words::left(&lock(&self.state.words).clone(), self.body);
        let form = Form::of(self.path, &self.body["model"]);
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\n\r\n",
            form.content_type()
        );
        self.stream.write_all(head.as_bytes()).await?;
        let mut lines: Vec<String> = words.iter().map(|word| form.word(word)).collect();
        if *behaviour == Behaviour::Calls {
            lines = form.calls();
        }
        lines.extend(form.end(words.len(), behaviour));
        let first = |tokens: &usize| (*tokens).min(words.len());
        match behaviour {
            Behaviour::CutAfter(tokens) => {
                self.chunks(&lines[..first(tokens)]).await?;
                // Half a chunk, then nothing: the length promised more.
                self.stream.write_all(b"40\r\n{\"mess").await?;
                return Ok(false);
            }
            Behaviour::ErrorLineAfter(tokens, message) => {
                self.chunks(&lines[..first(tokens)]).await?;
                self.chunks(&[form.error(message)]).await?;
            }
            Behaviour::EndWithoutDone(tokens) => self.chunks(&lines[..first(tokens)]).await?,
            Behaviour::StallAfter(tokens) => {
                self.chunks(&lines[..first(tokens)]).await?;
                if !self.released().await {
                    return Ok(false);
                }
                self.chunks(&lines[first(tokens)..]).await?;
            }
            Behaviour::Drip => {
                for byte in lines.join("\n").into_bytes().into_iter().chain([b'\n']) {
                    self.chunk(&[byte]).await?;
                }
            }
            Behaviour::LastWordWithEnd => {
                let last = form.last_word(&words[words.len() - 1], &lines[words.len()]);
                lines.splice(words.len() - 1..=words.len(), [last]);
                self.chunks(&lines).await?;
            }
            Behaviour::BadText => {
                self.chunks(&lines[..1]).await?;
                let broken: Vec<u8> = lines[1].bytes().map(|b| if b == b'd' { 0xff } else { b }).collect();
                self.chunk(&broken).await?;
                self.chunk(b"\n").await?;
            }
            Behaviour::Lump => self.chunk((lines.join("\n") + "\n").as_bytes()).await?,
            Behaviour::HugeLine(length) => self.chunk(&vec![b'x'; *length]).await?,
            _ => self.chunks(&lines).await?,
        }
        self.stream.write_all(b"0\r\n\r\n").await?;
        Ok(true)
    }

    async fn chunks(&mut self, lines: &[String]) -> io::Result<()> {
        for line in lines {
            self.chunk(format!("{line}\n").as_bytes()).await?;
        }
        Ok(())
    }

    async fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(format!("{:x}\r\n", bytes.len()).as_bytes()).await?;
        self.stream.write_all(bytes).await?;
        self.stream.write_all(b"\r\n").await
    }

    /// Waits for [`Host::release`]; false if the client leaves before.
    async fn released(&mut self) -> bool {
        tokio::select! {
            () = self.state.release.notified() => true,
            _ended = wait_for_end(self.stream) => false,
        }
    }
}

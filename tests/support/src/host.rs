//! A stand-in for an Ollama host on loopback that does what a test says, down to the bytes and the way a connection
//! ends. It answers chat, generate, embed, ps, version, preload and unload as Ollama does, and records every request.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// What the host does with requests for text or vectors; the other paths always work, except where stated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Answers.
    Normal,
    /// Takes every connection and never says a word, on any path.
    BlackHole,
    /// Answers with this status and body.
    Status(u16, String),
    /// Answers with this status, and never sends the body it announces.
    StatusWithoutBody(u16),
    /// Answers 200 with a page, as a proxy does.
    Html,
    /// Answers with a redirect to this address.
    Redirect(String),
    /// Says nothing until [`Host::release`] is called.
    SlowFirstByte,
    /// Closes the connection in the middle of the answer, after so many tokens.
    CutAfter(usize),
    /// Ends the answer with an error line, after so many tokens.
    ErrorLineAfter(usize, String),
    /// Ends the answer properly, after so many tokens, but without `done`.
    EndWithoutDone(usize),
    /// Goes silent after so many tokens, until [`Host::release`] is called.
    StallAfter(usize),
    /// Sends the answer byte by byte: lines and characters come in pieces.
    Drip,
    /// Brings the last word in the line that ends the answer.
    LastWordWithEnd,
    /// Sends all lines at once.
    Lump,
    /// Sends a line of so many bytes.
    HugeLine(usize),
    /// Refuses requests that say anything about thinking, as old models do.
    NoThinking,
}

/// A request as the host got it.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// `POST`, ...
    pub method: String,
    /// `/api/chat`, ...
    pub path: String,
    /// The body; null if there was none.
    pub body: Value,
}

/// The running host. It ends when this is dropped.
#[derive(Debug)]
pub struct Host {
    address: SocketAddr,
    state: Arc<State>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    behaviour: Mutex<Behaviour>,
    words: Mutex<Vec<String>>,
    requests: Mutex<Vec<Recorded>>,
    loaded: Mutex<BTreeSet<String>>,
    release: Notify,
    /// Open connections.
    connections: watch::Sender<usize>,
    /// Requests being answered, and the most there ever were.
    answering: Mutex<(usize, usize)>,
}

impl Host {
    /// Starts a host that behaves normally.
    ///
    /// # Errors
    /// No port on loopback is to be had.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let state = Arc::new(State {
            behaviour: Mutex::new(Behaviour::Normal),
            words: Mutex::new(["hola ", "desde ", "el ", "host ñ😀"].map(str::to_owned).to_vec()),
            requests: Mutex::default(),
            loaded: Mutex::default(),
            release: Notify::new(),
            connections: watch::Sender::new(0),
            answering: Mutex::default(),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&state)));
        Ok(Self { address, state, accepting })
    }

    /// An address on loopback that refuses connections.
    ///
    /// # Errors
    /// No port on loopback is to be had.
    pub async fn refusing() -> io::Result<String> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        Ok(format!("http://{}", listener.local_addr()?))
    }

    /// The host's base address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on it behaves so.
    pub fn behave(&self, behaviour: Behaviour) {
        *lock(&self.state.behaviour) = behaviour;
    }

    /// From now on it says these tokens.
    pub fn say(&self, words: &[&str]) {
        *lock(&self.state.words) = words.iter().map(|&word| word.to_owned()).collect();
    }

    /// Lets those go on that wait in [`Behaviour::SlowFirstByte`] and [`Behaviour::StallAfter`].
    pub fn release(&self) {
        self.state.release.notify_waiters();
    }

    /// All requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        lock(&self.state.requests).clone()
    }

    /// The models it holds in memory.
    #[must_use]
    pub fn loaded(&self) -> Vec<String> {
        lock(&self.state.loaded).iter().cloned().collect()
    }

    /// The most requests that were being answered at once.
    #[must_use]
    pub fn most_at_once(&self) -> usize {
        lock(&self.state.answering).1
    }

    /// Waits until so many connections are open; false if that takes longer than `limit`.
    pub async fn connections_become(&self, count: usize, limit: Duration) -> bool {
        let mut connections = self.state.connections.subscribe();
        let reached = connections.wait_for(|open| *open == count);
        matches!(tokio::time::timeout(limit, reached).await, Ok(Ok(_)))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    // Aborted with this task, because it owns them.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        connections.spawn(async move {
            state.connections.send_modify(|open| *open += 1);
            let _open = Open(Arc::clone(&state));
            // A client that goes away is what many tests are about.
            let _gone = serve(stream, &state).await;
        });
    }
}

/// Counts a connection until it ends, also when its task is aborted.
struct Open(Arc<State>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections.send_modify(|open| *open -= 1);
    }
}

/// Counts a request until it is answered or given up.
struct Answering<'a>(&'a State);

impl<'a> Answering<'a> {
    fn begin(state: &'a State) -> Self {
        let mut answering = lock(&state.answering);
        answering.0 += 1;
        answering.1 = answering.1.max(answering.0);
        Self(state)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        lock(&self.0.answering).0 -= 1;
    }
}

async fn serve(stream: TcpStream, state: &State) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    while let Some(request) = read_request(&mut stream).await? {
        lock(&state.requests).push(request.clone());
        let behaviour = lock(&state.behaviour).clone();
        if behaviour == Behaviour::BlackHole {
            return wait_for_end(&mut stream).await;
        }
        let body = request.body;
        let _answering = Answering::begin(state);
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/api/version") => reply(&mut stream, 200, &json!({"version": "0.32.15"})).await?,
            ("GET", "/api/ps") => reply(&mut stream, 200, &json!({"models": ps(state)})).await?,
            ("POST", "/api/chat") if is_empty(&body, "messages") => {
                preload(&mut stream, state, &body).await?
            }
            ("POST", "/api/generate") if is_empty(&body, "prompt") => {
                preload(&mut stream, state, &body).await?
            }
            ("POST", "/api/chat" | "/api/generate" | "/api/embed") => {
                let answer = Answer { stream: &mut stream, state, path: &request.path, body: &body };
                if !answer.give(behaviour).await? {
                    return Ok(());
                }
            }
            _ => reply(&mut stream, 404, &json!({"error": "no such path"})).await?,
        }
    }
    Ok(())
}

fn is_empty(body: &Value, key: &str) -> bool {
    match &body[key] {
        Value::Array(all) => all.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => true,
    }
}

fn ps(state: &State) -> Vec<Value> {
    let model = |name: &String| {
        json!({
            "name": name, "model": name, "size": 6_600_000_000_u64, "size_vram": 0, "context_length": 4096,
            "digest": "d1ce", "expires_at": "2318-01-01T00:00:00Z", "details": {"family": "llama"}
        })
    };
    lock(&state.loaded).iter().map(model).collect()
}

/// A request without a prompt loads the model, or with `keep_alive: 0` unloads it.
async fn preload(stream: &mut BufReader<TcpStream>, state: &State, body: &Value) -> io::Result<()> {
    let model = with_tag(body);
    let reason = if body["keep_alive"] == json!(0) {
        lock(&state.loaded).remove(&model);
        "unload"
    } else {
        lock(&state.loaded).insert(model.clone());
        "load"
    };
    reply(stream, 200, &json!({"model": model, "done": true, "done_reason": reason})).await
}

fn with_tag(body: &Value) -> String {
    let model = body["model"].as_str().unwrap_or_default();
    if model.contains(':') { model.to_owned() } else { format!("{model}:latest") }
}

/// A request for text or vectors on its way to being answered.
struct Answer<'a> {
    stream: &'a mut BufReader<TcpStream>,
    state: &'a State,
    path: &'a str,
    body: &'a Value,
}

impl Answer<'_> {
    /// Answers; false if the connection is to be closed.
    async fn give(mut self, behaviour: Behaviour) -> io::Result<bool> {
        match behaviour {
            Behaviour::Status(status, body) => {
                send(self.stream, status, "application/json", body.as_bytes(), "").await?;
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
            _ => {}
        }
        lock(&self.state.loaded).insert(with_tag(self.body));
        if self.path == "/api/embed" {
            let inputs = self.body["input"].as_array().map_or(1, Vec::len);
            let vectors: Vec<[f32; 3]> = (0..inputs).map(|n| [3.0, 4.0, n as f32 * 0.0]).collect();
            let body = json!({"embeddings": vectors, "prompt_eval_count": inputs * 2});
            reply(self.stream, 200, &body).await?;
            return Ok(true);
        }
        self.stream_text(&behaviour).await
    }

    async fn stream_text(&mut self, behaviour: &Behaviour) -> io::Result<bool> {
        let head =
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";
        self.stream.write_all(head.as_bytes()).await?;
        let words = lock(&self.state.words).clone();
        let mut lines: Vec<String> = words.iter().map(|word| self.line(word)).collect();
        let done = json!({
            "model": self.body["model"], "done": true, "done_reason": "stop", "load_duration": 5_000_000_u64,
            "prompt_eval_count": 7, "eval_count": words.len(), "eval_duration": 2_000_000_000_u64
        });
        lines.push(done.to_string());
        match behaviour {
            Behaviour::CutAfter(tokens) => {
                self.chunks(&lines[..*tokens]).await?;
                // Half a chunk, then nothing: the length promised more.
                self.stream.write_all(b"40\r\n{\"mess").await?;
                return Ok(false);
            }
            Behaviour::ErrorLineAfter(tokens, message) => {
                self.chunks(&lines[..*tokens]).await?;
                self.chunks(&[json!({"error": message}).to_string()]).await?;
            }
            Behaviour::EndWithoutDone(tokens) => self.chunks(&lines[..*tokens]).await?,
            Behaviour::StallAfter(tokens) => {
                self.chunks(&lines[..*tokens]).await?;
                if !self.released().await {
                    return Ok(false);
                }
                self.chunks(&lines[*tokens..]).await?;
            }
            Behaviour::Drip => {
                for byte in lines.join("\n").into_bytes().into_iter().chain([b'\n']) {
                    self.chunk(&[byte]).await?;
                }
            }
            Behaviour::LastWordWithEnd => {
                let mut last: Value = serde_json::from_str(&lines[words.len() - 1]).unwrap_or_default();
                last["done"] = json!(true);
                lines.truncate(words.len() - 1);
                lines.push(last.to_string());
                self.chunks(&lines).await?;
            }
            Behaviour::Lump => self.chunk((lines.join("\n") + "\n").as_bytes()).await?,
            Behaviour::HugeLine(length) => self.chunk(&vec![b'x'; *length]).await?,
            _ => self.chunks(&lines).await?,
        }
        self.stream.write_all(b"0\r\n\r\n").await?;
        Ok(true)
    }

    fn line(&self, word: &str) -> String {
        let model = &self.body["model"];
        match self.path {
            "/api/chat" => {
                json!({"model": model, "message": {"role": "assistant", "content": word}, "done": false})
            }
            _ => json!({"model": model, "response": word, "done": false}),
        }
        .to_string()
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

async fn read_request(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Recorded>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut length = 0;
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).await?;
        if header.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Some(Recorded { method, path, body: serde_json::from_slice(&body).unwrap_or(Value::Null) }))
}

async fn wait_for_end(stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    let mut rest = [0; 256];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

async fn reply(stream: &mut BufReader<TcpStream>, status: u16, body: &Value) -> io::Result<()> {
    send(stream, status, "application/json", body.to_string().as_bytes(), "").await
}

async fn send(
    stream: &mut BufReader<TcpStream>,
    status: u16,
    kind: &str,
    body: &[u8],
    headers: &str,
) -> io::Result<()> {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

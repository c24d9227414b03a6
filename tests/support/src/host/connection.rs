//! Connections and requests, below what is answered.

use std::io;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::answer::Answer;
use super::{Behaviour, Recorded, State, lock};

pub(super) async fn accept(listener: TcpListener, state: Arc<State>) {
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
    let mut requests = 0;
    while let Some(request) = read_request(&mut stream).await? {
        requests += 1;
        lock(&state.requests).push(request.clone());
        let behaviour = lock(&state.behaviour).clone();
        if behaviour == Behaviour::HangUpOnReuse && requests > 1 {
            return Ok(());
        }
        if behaviour == Behaviour::BlackHole {
            return wait_for_end(&mut stream).await;
        }
        let body = request.body;
        let _answering = Answering::begin(state);
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/api/version") => reply(&mut stream, 200, &json!({"version": "0.32.15"})).await?,
            ("GET", "/api/ps") => {
                let models = lock(&state.memory).listed();
                reply(&mut stream, 200, &json!({"models": models})).await?;
            }
            ("GET", "/api/tags") => {
                let models = lock(&state.memory).on_disk();
                reply(&mut stream, 200, &json!({"models": models})).await?;
            }
            ("GET", "/v1/models") => {
                let models = lock(&state.memory).on_disk();
                let data: Vec<Value> = models.iter().map(|model| json!({"id": model["name"]})).collect();
                reply(&mut stream, 200, &json!({"object": "list", "data": data})).await?;
            }
            ("POST", "/api/chat") if is_empty(&body, "messages") => {
                preload(&mut stream, state, &body).await?
            }
            ("POST", "/api/generate") if is_empty(&body, "prompt") => {
                preload(&mut stream, state, &body).await?
            }
            (
                "POST",
                "/api/chat"
                | "/api/generate"
                | "/api/embed"
                | "/v1/chat/completions"
                | "/v1/completions"
                | "/v1/embeddings"
                | "/v1/audio/transcriptions",
            ) => {
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

/// A request without a prompt loads the model, or with `keep_alive: 0` unloads it.
async fn preload(stream: &mut BufReader<TcpStream>, state: &State, body: &Value) -> io::Result<()> {
    let model = body["model"].as_str().unwrap_or_default();
    let reason = if body["keep_alive"] == json!(0) {
        lock(&state.memory).unload(model);
        "unload"
    } else {
        lock(&state.memory).use_now(model);
        "load"
    };
    reply(stream, 200, &json!({"model": model, "done": true, "done_reason": reason})).await
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Recorded>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut length, mut authorization) = (0, None);
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).await?;
        if header.trim().is_empty() {
            break;
        }
        let Some((name, value)) = header.split_once(':') else { continue };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap_or(0);
        } else if name.eq_ignore_ascii_case("authorization") {
            authorization = Some(value.trim().to_owned());
        }
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    let body = match serde_json::from_slice(&bytes) {
        Ok(json) => json,
        Err(_) if bytes.is_empty() => Value::Null,
        // A form.
        Err(_) => Value::String(String::from_utf8_lossy(&bytes).into_owned()),
    };
    Ok(Some(Recorded { method, path, authorization, body, bytes }))
}

pub(super) async fn wait_for_end(stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    let mut rest = [0; 256];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

pub(super) async fn reply(stream: &mut BufReader<TcpStream>, status: u16, body: &Value) -> io::Result<()> {
    send(stream, status, "application/json", body.to_string().as_bytes(), "").await
}

pub(super) async fn send(
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

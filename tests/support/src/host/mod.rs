//! A stand-in for a host on loopback that does what a test says, down to the bytes and the way a connection ends. It answers
//! as an Ollama does (chat, generate, embed, ps, tags, version, preload and unload) and as a host of OpenAI's protocol does
//! (chat, completions, embeddings, transcriptions, models), and records every request.

mod answer;
mod behaviour;
mod connection;
mod memory;
mod words;

pub use behaviour::Behaviour;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use memory::Memory;

/// A request as the host got it.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// `POST`, ...
    pub method: String,
    /// `/api/chat`, ...
    pub path: String,
    /// The header of that name, if there was one.
    pub authorization: Option<String>,
    /// The body; null if there was none. One that is no JSON is text, with U+FFFD for what is none.
    pub body: Value,
    /// The body as it came.
    pub bytes: Vec<u8>,
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
    memory: Mutex<Memory>,
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
            memory: Mutex::default(),
            release: Notify::new(),
            connections: watch::Sender::new(0),
            answering: Mutex::default(),
        });
        let accepting = tokio::spawn(connection::accept(listener, Arc::clone(&state)));
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

    /// Forgets them, for a host that runs for long.
    pub fn forget_requests(&self) {
        lock(&self.state.requests).clear();
    }

    /// The models it holds in memory.
    #[must_use]
    pub fn loaded(&self) -> Vec<String> {
        lock(&self.state.memory).loaded()
    }

    /// What it holds in memory, in bytes.
    #[must_use]
    pub fn held(&self) -> u64 {
        lock(&self.state.memory).held()
    }

    /// The most that it ever held.
    #[must_use]
    pub fn most_held(&self) -> u64 {
        lock(&self.state.memory).most()
    }

    /// It has this model on disk, which takes so many bytes in memory.
    pub fn has(&self, model: &str, bytes: u64) {
        lock(&self.state.memory).has(model, bytes);
    }

    /// Another client uses a model: it is loaded, and its expiry moves.
    pub fn use_elsewhere(&self, model: &str) {
        lock(&self.state.memory).use_now(model);
    }

    /// From now on a model that is to be unloaded stays.
    pub fn hold_on(&self) {
        lock(&self.state.memory).hold_on();
    }

    /// Its clock jumps back by an hour.
    pub fn jump_back(&self) {
        lock(&self.state.memory).jump_back();
    }

    /// Ends at once, as when its machine loses power: no connection is opened any more, and those that are open break.
    pub fn kill(&self) {
        self.accepting.abort();
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

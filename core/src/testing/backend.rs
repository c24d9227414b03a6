use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::StreamExt;
use tokio::sync::Semaphore;

use crate::backend::{Asked, Backend, Host, HostState, Hosts, LoadRequest, Model, ServedBy};
use crate::failure::{Failure, FailureKind};
use crate::memory::{Estimate, Footprint, Freed};
use crate::request::{
    Capabilities, Capability, Completion, Delta, Embeddings, FinishReason, GenerateRequest, TokenStream,
};
use crate::units::Bytes;

/// A backend that does what its script says, and counts what was asked of it. Clones share script and counters.
#[derive(Clone, Debug)]
pub struct FakeBackend {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    served_by: ServedBy,
    size: Bytes,
    script: Mutex<Script>,
    /// A permit lets one load end.
    loads_may_end: Semaphore,
    loads: AtomicUsize,
    cancelled_loads: AtomicUsize,
    loaded: AtomicUsize,
    streams: AtomicUsize,
    requests: AtomicUsize,
    told_available: AtomicU64,
    /// Bytes of the size that a context of [`N_CTX`] tokens takes.
    context: AtomicU64,
    n_ctx: AtomicU32,
    /// Whether it is a host.
    remote: AtomicBool,
    asked: Mutex<Vec<GenerateRequest>>,
}

/// The context's length at load.
const N_CTX: u32 = 512;

impl State {
    /// As loaded with a context of this length.
    fn estimate(&self, n_ctx: u32) -> Estimate {
        let context = self.context.load(Ordering::SeqCst);
        Estimate {
            weights: self.size.saturating_sub(Bytes(context)),
            kv: Bytes(context * u64::from(n_ctx) / u64::from(N_CTX)),
            n_ctx: Some(n_ctx),
            ..Estimate::default()
        }
    }
}

#[derive(Clone, Debug)]
struct Script {
    says: Vec<String>,
    /// After the text: fails so instead of ending.
    fails: Option<FailureKind>,
    /// After the text: neither ends nor fails.
    hangs: bool,
    estimate_fails: Option<FailureKind>,
    load_fails: Option<FailureKind>,
    load_panics: bool,
    loads_wait: bool,
    /// What it really holds once it is loaded, where that is not what it was estimated at.
    takes: Option<Bytes>,
    measuring_panics: bool,
    gives_back: Option<Freed>,
}

impl FakeBackend {
    /// A backend of this size that loads at once and says `ok`.
    #[must_use]
    pub fn new(served_by: ServedBy, size: Bytes) -> Self {
        let script = Script {
            says: vec!["ok".to_owned()],
            fails: None,
            hangs: false,
            estimate_fails: None,
            load_fails: None,
            load_panics: false,
            loads_wait: false,
            takes: None,
            measuring_panics: false,
            gives_back: None,
        };
        Self {
            state: Arc::new(State {
                served_by,
                size,
                script: Mutex::new(script),
                loads_may_end: Semaphore::new(0),
                loads: AtomicUsize::new(0),
                cancelled_loads: AtomicUsize::new(0),
                loaded: AtomicUsize::new(0),
                streams: AtomicUsize::new(0),
                requests: AtomicUsize::new(0),
                told_available: AtomicU64::new(0),
                context: AtomicU64::new(0),
                n_ctx: AtomicU32::new(N_CTX),
                remote: AtomicBool::new(false),
                asked: Mutex::default(),
            }),
        }
    }

    /// A local file of this name and size.
    #[must_use]
    pub fn local(file: &str, size: u64) -> Self {
        Self::new(ServedBy::GgufNative(file.into()), Bytes(size))
    }

    /// A model on a host of this name.
    #[must_use]
    pub fn remote(host: &str) -> Self {
        let name = host.parse().expect("a test names hosts as hosts are named");
        let backend = Self::new(ServedBy::OllamaHttp(name), Bytes::ZERO);
        backend.state.remote.store(true, Ordering::SeqCst);
        backend
    }

    /// So much of its size is its context's, which can become half as long.
    #[must_use]
    pub fn context(self, bytes: u64) -> Self {
        self.state.context.store(bytes, Ordering::SeqCst);
        self
    }

    /// Answers with these pieces of text.
    #[must_use]
    pub fn says(self, pieces: &[&str]) -> Self {
        self.change(|script| script.says = pieces.iter().map(|&piece| piece.to_owned()).collect())
    }

    /// Fails after its text, or at once where there is none.
    #[must_use]
    pub fn fails(self, kind: FailureKind) -> Self {
        self.change(|script| script.fails = Some(kind))
    }

    /// Goes silent after its text.
    #[must_use]
    pub fn hangs(self) -> Self {
        self.change(|script| script.hangs = true)
    }

    /// Its size cannot be told.
    #[must_use]
    pub fn estimate_fails(self, kind: FailureKind) -> Self {
        self.change(|script| script.estimate_fails = Some(kind))
    }

    /// Its loads fail.
    #[must_use]
    pub fn load_fails(self, kind: FailureKind) -> Self {
        self.change(|script| script.load_fails = Some(kind))
    }

    /// Its loads panic.
    #[must_use]
    pub fn load_panics(self) -> Self {
        self.change(|script| script.load_panics = true)
    }

    /// Its loads end only when the test says so.
    #[must_use]
    pub fn loads_wait(self) -> Self {
        self.change(|script| script.loads_wait = true)
    }

    /// Looking at what it holds panics.
    #[must_use]
    pub fn measuring_panics(self) -> Self {
        self.change(|script| script.measuring_panics = true)
    }

    /// Its unloads give so much back of what it held.
    #[must_use]
    pub fn gives_back(self, held: u64, returned: u64) -> Self {
        let freed = Freed { held: Bytes(held), returned: Bytes(returned) };
        self.change(|script| script.gives_back = Some(freed))
    }

    /// From now on it holds so much while it is loaded, whatever it was estimated at.
    pub fn takes(&self, bytes: u64) {
        self.state.script.lock().unwrap_or_else(PoisonError::into_inner).takes = Some(Bytes(bytes));
    }

    /// Lets one load end.
    pub fn finish_load(&self) {
        self.state.loads_may_end.add_permits(1);
    }

    /// Loads that were started.
    #[must_use]
    pub fn loads(&self) -> usize {
        self.state.loads.load(Ordering::SeqCst)
    }

    /// Loads that were given up.
    #[must_use]
    pub fn cancelled_loads(&self) -> usize {
        self.state.cancelled_loads.load(Ordering::SeqCst)
    }

    /// Models that are loaded and not yet unloaded.
    #[must_use]
    pub fn loaded(&self) -> usize {
        self.state.loaded.load(Ordering::SeqCst)
    }

    /// Streams that were neither read to their end nor dropped.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.state.streams.load(Ordering::SeqCst)
    }

    /// Requests that reached a model.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// The requests for text that reached it.
    #[must_use]
    pub fn asked(&self) -> Vec<GenerateRequest> {
        self.state.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was said to be available when its size was last asked for.
    #[must_use]
    pub fn told_available(&self) -> Bytes {
        Bytes(self.state.told_available.load(Ordering::SeqCst))
    }

    fn change(self, change: impl FnOnce(&mut Script)) -> Self {
        change(&mut self.state.script.lock().unwrap_or_else(PoisonError::into_inner));
        self
    }

    fn script(&self) -> Script {
        self.state.script.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Backend for FakeBackend {
    fn served_by(&self) -> ServedBy {
        self.state.served_by.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::of(&[Capability::Generate, Capability::Embed])
    }

    fn hosts(&self) -> Option<&dyn Hosts> {
        self.state.remote.load(Ordering::SeqCst).then_some(self)
    }

    async fn estimate(&self, available: Bytes) -> Result<Estimate, Failure> {
        self.state.told_available.store(available.0, Ordering::SeqCst);
        match self.script().estimate_fails {
            Some(kind) => Err(scripted(kind)),
            None => {
                let shorter = vec![self.state.estimate(N_CTX / 2)];
                Ok(Estimate { shorter, ..self.state.estimate(N_CTX) })
            }
        }
    }

    async fn load(&self, request: LoadRequest) -> Result<Arc<dyn Model>, Failure> {
        self.state.loads.fetch_add(1, Ordering::SeqCst);
        let script = self.script();
        assert!(!script.load_panics, "scripted panic");
        if script.loads_wait {
            tokio::select! {
                // Never closed: the only way to an end is a permit.
                Ok(permit) = self.state.loads_may_end.acquire() => permit.forget(),
                () = request.cancel.cancelled() => {
                    self.state.cancelled_loads.fetch_add(1, Ordering::SeqCst);
                    return Err(scripted(FailureKind::Cancelled));
                }
            }
        }
        if let Some(kind) = script.load_fails {
            return Err(scripted(kind));
        }
        (request.progress)(1.0);
        self.state.n_ctx.store(N_CTX, Ordering::SeqCst);
        self.state.loaded.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(self.clone()))
    }
}

#[async_trait]
impl Model for FakeBackend {
    fn n_ctx(&self) -> Option<u32> {
        Some(self.state.n_ctx.load(Ordering::SeqCst))
    }

    fn memory(&self) -> Option<Footprint> {
        let script = self.script();
        assert!(!script.measuring_panics, "scripted panic");
        let estimated = self.state.estimate(self.state.n_ctx.load(Ordering::SeqCst)).total();
        let anonymous = Some(script.takes.unwrap_or(estimated));
        Some(Footprint { file_backed: Bytes::ZERO, anonymous, exact: true })
    }

    async fn resize(&self, n_ctx: u32) -> Result<(), Failure> {
        self.state.n_ctx.store(n_ctx, Ordering::SeqCst);
        Ok(())
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, Failure> {
        self.state.requests.fetch_add(1, Ordering::SeqCst);
        self.state.asked.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
        let mut script = self.script();
        if let Some(prefill) = &request.prefill {
            script.says = after(&script.says, &prefill.text);
        }
        if let (true, Some(kind)) = (script.says.is_empty(), script.fails) {
            return Err(scripted(kind));
        }
        let completion = Completion {
            prompt_tokens: Some(3),
            completion_tokens: Some(script.says.len() as u32),
            decode_time: Some(std::time::Duration::from_secs(1)),
            ..Completion::new(FinishReason::Stop)
        };
        let end = script.fails.map_or(Ok(Delta::Done(completion)), |kind| Err(scripted(kind)));
        let text = futures::stream::iter(script.says.into_iter().map(|piece| Ok(Delta::Text(piece))));
        let tail = if script.hangs {
            futures::stream::pending().boxed()
        } else {
            futures::stream::once(async { end }).boxed()
        };
        let counted = Counted::new(Arc::clone(&self.state));
        Ok(text.chain(tail).inspect(move |_| counted.touch()).boxed())
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embeddings, Failure> {
        self.state.requests.fetch_add(1, Ordering::SeqCst);
        if let Some(kind) = self.script().fails {
            return Err(scripted(kind));
        }
        Ok(Embeddings { vectors: texts.iter().map(|_| vec![1.0, 0.0]).collect(), prompt_tokens: Some(1) })
    }

    async fn unload(&self) -> Option<Freed> {
        self.state.loaded.fetch_sub(1, Ordering::SeqCst);
        self.script().gives_back
    }
}

#[async_trait]
impl Hosts for FakeBackend {
    async fn next(&self, asked: Asked<'_>) -> Result<Option<Host>, Failure> {
        let served_by = self.state.served_by.clone();
        let left = !asked.failed.contains(&served_by);
        Ok(left.then(|| Host { served_by, model: Arc::new(self.clone()) }))
    }

    fn states(&self) -> Vec<HostState> {
        Vec::new()
    }
}

/// The pieces without what was said before.
fn after(pieces: &[String], said: &str) -> Vec<String> {
    let mut skip = said.len();
    let left = pieces.iter().filter_map(|piece| {
        let skipped = skip.min(piece.len());
        skip -= skipped;
        (skipped < piece.len()).then(|| piece[skipped..].to_owned())
    });
    left.collect()
}

/// Counts a stream for as long as it lives.
struct Counted(Arc<State>);

impl Counted {
    fn new(state: Arc<State>) -> Self {
        state.streams.fetch_add(1, Ordering::SeqCst);
        Self(state)
    }

    /// Called from the stream, so that the stream owns it.
    fn touch(&self) {}
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::SeqCst);
    }
}

fn scripted(kind: FailureKind) -> Failure {
    Failure::new(kind, format!("scripted {}", kind.as_str()))
}

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use async_trait::async_trait;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::model::LlamaModel;
use sarai_core::backend::{LoadRequest, Model};
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::Footprint;
use sarai_core::request::{Capability, Delta, Embeddings, GenerateRequest, LabelScore, TokenStream};
use sarai_core::units::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::generate::Job;
use super::header::Header;
use super::runtime::{LoadTurn, active};
use super::{GgufSettings, check, embed, generate, load, measure};
use crate::Error;

/// Requests that may wait for the thread; the pool's leases keep them below this.
const WAITING: usize = 16;
/// Pieces of text that may wait for their reader.
const UNREAD: usize = 32;

/// What the thread is asked for.
enum Command {
    Generate(Job),
    Embed { texts: Vec<String>, reply: oneshot::Sender<Result<Embeddings, Error>> },
    Classify { text: String, reply: oneshot::Sender<Result<Vec<LabelScore>, Error>> },
    Stop,
}

/// A loaded model, seen from the rest of the program: a thread owns it, and this talks to the thread.
pub(super) struct Worker {
    path: PathBuf,
    n_ctx: u32,
    /// What the load added to this process's own memory, where that could be measured.
    anonymous: Option<Bytes>,
    commands: mpsc::Sender<Command>,
    stopping: CancellationToken,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread reports once its model is ready.
struct Ready {
    n_ctx: u32,
    anonymous: Option<Bytes>,
}

/// Starts the thread and waits until its model is ready. After an error nothing of it is left.
///
/// # Cancel safety
/// Dropping the future lets the load end and its result go; the request's token stops it at once.
pub(super) async fn start(
    settings: Arc<GgufSettings>,
    header: Header,
    request: LoadRequest,
) -> Result<Worker, Failure> {
    let path = settings.path.clone();
    let turn = tokio::select! {
        turn = LoadTurn::wait(settings.purpose != Capability::Generate) => turn,
        () = request.cancel.cancelled() => return Err(Error::LoadCancelled { path }.into()),
    };
    let (commands, commanded) = mpsc::channel(WAITING);
    let (ready, loaded) = oneshot::channel();
    let stopping = CancellationToken::new();
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let thread = {
        let (stopping, span) = (stopping.clone(), tracing::Span::current());
        let body = move || {
            let _entered = span.entered();
            run(&settings, &header, &request, turn, ready, commanded, &stopping);
        };
        std::thread::Builder::new().name(format!("llama-{stem}")).spawn(body)
    };
    let thread = thread.map_err(|error| Failure::new(FailureKind::Engine, error))?;
    match loaded.await.unwrap_or_else(|_| Err(Error::EngineGone { path: path.clone() })) {
        Ok(Ready { n_ctx, anonymous }) => {
            Ok(Worker { path, n_ctx, anonymous, commands, stopping, thread: Mutex::new(Some(thread)) })
        }
        Err(error) => {
            join(thread, &path).await;
            Err(error.into())
        }
    }
}

/// The thread: loads, works off commands until it is told to stop or nobody can tell it any more, and gives everything
/// back.
fn run(
    settings: &GgufSettings,
    header: &Header,
    request: &LoadRequest,
    turn: LoadTurn,
    ready: oneshot::Sender<Result<Ready, Error>>,
    mut commands: mpsc::Receiver<Command>,
    stopping: &CancellationToken,
) {
    let before = measure::anonymous();
    let model = match load::model(settings, request) {
        Ok(model) => model,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let n_ctx = request.estimate.n_ctx.unwrap_or(header.int("{arch}.context_length").unwrap_or(512) as u32);
    let mut context = match load::context(&model, header, settings, n_ctx) {
        Ok(context) => context,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let grown = |(before, after): (Bytes, Bytes)| after.saturating_sub(before);
    let anonymous = before.zip(measure::anonymous()).map(grown).filter(|_| turn.was_alone());
    drop(turn);
    if ready.send(Ok(Ready { n_ctx: context.n_ctx(), anonymous })).is_err() {
        return;
    }
    let labels = check::labels(header);
    while let Some(command) = commands.blocking_recv() {
        if stopping.is_cancelled() {
            return;
        }
        work(&model, &mut context, command, &labels, stopping);
    }
}

/// Waits until a thread that is told to end has ended, and gives back what the C library kept of its memory.
async fn join(thread: JoinHandle<()>, path: &Path) {
    let joined = tokio::task::spawn_blocking(move || {
        let ended = thread.join();
        measure::trim();
        ended
    });
    if !matches!(joined.await, Ok(Ok(()))) {
        tracing::error!(path = %path.display(), "the engine's thread panicked");
    }
}

fn work(
    model: &LlamaModel,
    context: &mut LlamaContext<'_>,
    command: Command,
    labels: &[String],
    stopping: &CancellationToken,
) {
    match command {
        Command::Generate(job) => generate::run(model, context, &job, stopping),
        Command::Embed { texts, reply } => {
            let done = active(|| {
                embed::embed(model, context, &texts, &|| reply.is_closed() || stopping.is_cancelled())
            });
            // `None`: nobody waits for it.
            if let Some(result) = done.transpose() {
                drop(reply.send(result));
            }
        }
        Command::Classify { reply, .. } if reply.is_closed() => {}
        Command::Classify { text, reply } => {
            let done = active(|| embed::classify(model, context, &text, labels));
            drop(reply.send(done));
        }
        Command::Stop => {}
    }
}

impl Worker {
    async fn send(&self, command: Command) -> Result<(), Failure> {
        self.commands.send(command).await.map_err(|_| self.gone())
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Command,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| self.gone())?.map_err(Failure::from)
    }

    fn gone(&self) -> Failure {
        Error::EngineGone { path: self.path.clone() }.into()
    }

    fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[async_trait]
impl Model for Worker {
    fn n_ctx(&self) -> Option<u32> {
        Some(self.n_ctx)
    }

    fn memory(&self) -> Option<Footprint> {
        Some(Footprint { file_backed: measure::mapped(&self.path)?, anonymous: self.anonymous })
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, Failure> {
        let (deltas, stream) = mpsc::channel(UNREAD);
        self.send(Command::Generate(Job { request, deltas })).await?;
        let gone = self.gone();
        // Up to the end or an error. A stream without either is one whose thread has ended.
        let deltas = futures::stream::unfold(Some((stream, gone)), |open| async {
            let (mut stream, gone) = open?;
            match stream.recv().await {
                Some(Ok(Delta::Text(text))) => Some((Ok(Delta::Text(text)), Some((stream, gone)))),
                Some(end) => Some((end, None)),
                None => Some((Err(gone), None)),
            }
        });
        Ok(Box::pin(deltas))
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embeddings, Failure> {
        self.ask(|reply| Command::Embed { texts, reply }).await
    }

    async fn classify(&self, text: String) -> Result<Vec<LabelScore>, Failure> {
        self.ask(|reply| Command::Classify { text, reply }).await
    }

    async fn unload(&self) {
        self.stopping.cancel();
        // Wakes the thread if it waits; if it works, it sees the token. An error means that it has ended already.
        let _ended = self.commands.send(Command::Stop).await;
        if let Some(thread) = self.take_thread() {
            join(thread, &self.path).await;
        }
    }
}

/// Without an unload the thread ends by itself: after the step it is in, when it sees the token or that nobody can send.
impl Drop for Worker {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("path", &self.path).field("n_ctx", &self.n_ctx).finish_non_exhaustive()
    }
}

//! The thread of a loaded model, which owns all of llama.cpp's that belongs to it; and how others talk to it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use sarai_core::backend::LoadRequest;
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::{Estimate, Footprint, Freed};
use sarai_core::request::Capability;
use sarai_core::units::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::context::{Context, Shape};
use super::header::Header;
use super::load::Loaded;
use super::measure::Growth;
use super::multimodal::{self, Held, Multimodal};
use super::runtime::{self, Activity, LoadTurn};
use super::{GgufSettings, encoder, estimate, measure, projector, record, took, weights};
use crate::Error;

/// Commands that may wait for the thread; the pool's leases keep them below this.
pub(super) const WAITING: usize = 64;

/// A loaded model's thread, seen from the rest of the program.
pub(super) struct Thread<C> {
    path: PathBuf,
    holds: Arc<Holds>,
    /// Whether others had its weights before it.
    shared: bool,
    /// The thread has it; here it is for what needs no context.
    loaded: Weak<Loaded>,
    /// Where the model sees or hears.
    multimodal: Option<Multimodal>,
    commands: mpsc::Sender<C>,
    /// Work beside the thread, which holds the model too and cannot be stopped.
    beside: TaskTracker,
    stopping: CancellationToken,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread reports once its model is ready.
struct Ready {
    holds: Arc<Holds>,
    shared: bool,
    loaded: Weak<Loaded>,
    multimodal: Option<Multimodal>,
}

/// What the model has, as its thread tells.
struct Holds {
    n_ctx: AtomicU32,
    /// What the process gained by it, where that could be measured.
    gained: Mutex<Gained>,
    /// What its steps have added.
    growth: Growth,
    /// What its projector has.
    projector: Held,
}

/// What the process gained by a model. Where it loaded beside others, its weights say that they are not exact.
#[derive(Clone, Copy)]
struct Gained {
    weights: Option<Footprint>,
    context: Option<Bytes>,
}

/// Another context.
#[derive(Debug)]
pub(super) struct Resize {
    n_ctx: u32,
    /// In progress until it is done.
    activity: Activity,
    done: oneshot::Sender<Result<(), Error>>,
}

/// What the thread's work has.
pub(super) struct Workplace<'m, C> {
    pub(super) settings: &'m GgufSettings,
    pub(super) header: &'m Header,
    pub(super) shape: &'m Shape,
    pub(super) loaded: &'m Loaded,
    pub(super) context: Context<'m>,
    pub(super) growth: &'m mut Growth,
    pub(super) commands: &'m mut mpsc::Receiver<C>,
    pub(super) stopping: &'m CancellationToken,
}

impl Gained {
    fn total(self) -> Option<Footprint> {
        let weights = self.weights?;
        let anonymous = weights.anonymous.zip(self.context).map(|(weights, context)| weights + context);
        Some(Footprint { anonymous, exact: weights.exact && anonymous.is_some(), ..weights })
    }
}

impl Holds {
    /// What the model took at its load, or when it got its present context, and what its steps and its projector's work have
    /// added since; of the projector the most that it held, because it may take that again.
    fn gained(&self) -> Option<Footprint> {
        let gained = self.gained.lock().unwrap_or_else(PoisonError::into_inner).total()?;
        let added = self.growth.bytes() + self.projector.most();
        let anonymous = gained.anonymous.map(|anonymous| anonymous + added);
        let exact = gained.exact && self.growth.is_exact() && self.projector.is_exact();
        Some(Footprint { anonymous, exact, ..gained })
    }

    /// The same, of the projector what it holds now.
    fn held(&self) -> Option<Footprint> {
        let gained = self.gained()?;
        let given_back = self.projector.most().saturating_sub(self.projector.now());
        Some(Footprint { anonymous: gained.anonymous.map(|all| all.saturating_sub(given_back)), ..gained })
    }

    /// What the process gained of its own memory by this load and others is this load's part of it: of its weights and its
    /// context as these were expected to take.
    fn hear(&self, gained: Bytes, weights: Bytes, context: Bytes) {
        let all = (u128::from(weights.0) + u128::from(context.0)).max(1);
        let part = u64::try_from(u128::from(gained.0) * u128::from(weights.0) / all).unwrap_or(0);
        let mut own = self.gained.lock().unwrap_or_else(PoisonError::into_inner);
        own.weights =
            own.weights.map(|weights| Footprint { anonymous: Some(Bytes(part)), exact: false, ..weights });
        own.context = Some(gained.saturating_sub(Bytes(part)));
    }
}

impl<C: Send + 'static> Thread<C> {
    /// Starts the thread and waits until its model is ready. It then does `work`, which ends when its commands do, soon
    /// after it is told to stop, or to be begun again with another context. After an error nothing of it is left.
    ///
    /// # Cancel safety
    /// Dropping the future lets the load end and its result go; the request's token stops it at once.
    pub(super) async fn start(
        settings: Arc<GgufSettings>,
        header: Header,
        request: LoadRequest,
        work: impl FnMut(Workplace<'_, C>) -> Option<Resize> + Send + 'static,
    ) -> Result<Self, Failure> {
        let path = settings.path.clone();
        // The vocabulary is llama.cpp's from here on.
        let header = header.into_numbers();
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
                run(&settings, &header, &request, turn, ready, (commanded, stopping), work);
            };
            std::thread::Builder::new().name(format!("llama-{stem}")).spawn(body)
        };
        let thread = thread.map_err(|error| Failure::new(FailureKind::Engine, error))?;
        match loaded.await.unwrap_or_else(|_| Err(Error::EngineGone { path: path.clone() })) {
            Ok(Ready { holds, shared, loaded, multimodal }) => {
                let thread = Mutex::new(Some(thread));
                let beside = TaskTracker::new();
                Ok(Self { path, holds, shared, loaded, multimodal, commands, beside, stopping, thread })
            }
            Err(error) => {
                join(thread, &path).await;
                Err(error.into())
            }
        }
    }

    pub(super) fn n_ctx(&self) -> u32 {
        self.holds.n_ctx.load(Ordering::Relaxed)
    }

    pub(super) fn memory(&self) -> Option<Footprint> {
        Some(Footprint { file_backed: measure::mapped(&self.path)?, ..self.holds.held()? })
    }

    /// What turns images and audio into embeddings, where the model has it.
    pub(super) fn multimodal(&self) -> Option<&Multimodal> {
        self.multimodal.as_ref()
    }

    pub(super) fn memory_at_load(&self) -> Option<Footprint> {
        self.holds.gained()
    }

    /// Gives the model another context. `command` tells the thread to.
    pub(super) async fn resize(&self, n_ctx: u32, command: fn(Resize) -> C) -> Result<(), Failure> {
        let (done, is_done) = oneshot::channel();
        self.send(command(Resize { n_ctx, activity: Activity::begin(), done })).await?;
        is_done.await.map_err(|_| self.gone())?.map_err(Failure::from)
    }

    pub(super) async fn send(&self, command: C) -> Result<(), Failure> {
        self.commands.send(command).await.map_err(|_| self.gone())
    }

    pub(super) fn gone(&self) -> Failure {
        Error::EngineGone { path: self.path.clone() }.into()
    }

    /// Does what needs the model and no context, beside the thread and off the async ones.
    pub(super) async fn with_model<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Loaded) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Failure> {
        let loaded = self.loaded.upgrade().ok_or_else(|| self.gone())?;
        let done = self.beside.spawn_blocking(move || work(&loaded)).await;
        done.map_err(|panic| Failure::new(FailureKind::Engine, panic))?.map_err(Failure::from)
    }

    /// Ends the thread's work and waits until all it held is given back. `stop` wakes it if it waits.
    pub(super) async fn unload(&self, stop: C) -> Option<Freed> {
        let activity = Activity::begin();
        let before = self.resident().await;
        self.stopping.cancel();
        // An error means that it has ended already.
        let _ended = self.commands.send(stop).await;
        self.beside.close();
        self.beside.wait().await;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            join(thread, &self.path).await;
        }
        // Others hold the weights then.
        let shared = self.shared || self.loaded.strong_count() > 0;
        let (before, after) = (before?, self.resident().await?);
        let held = self.holds.held().filter(|held| held.exact && !shared && activity.was_alone())?;
        let held = before.file_backed + held.anonymous?;
        Some(Freed { held, returned: before.total()?.saturating_sub(after.total()?) })
    }

    /// What is resident of this model's file, and of the process's own memory. Pages of other models' files come and go by
    /// themselves.
    async fn resident(&self) -> Option<Footprint> {
        let path = self.path.clone();
        // Reads the kernel's page tables: not for a thread that serves others.
        let resident = tokio::task::spawn_blocking(move || {
            Some(Footprint { file_backed: measure::mapped(&path)?, ..measure::process()? })
        });
        resident.await.ok().flatten()
    }
}

/// Loads, works, and gives everything back.
fn run<C>(
    settings: &GgufSettings,
    header: &Header,
    request: &LoadRequest,
    turn: LoadTurn,
    ready: oneshot::Sender<Result<Ready, Error>>,
    (mut commands, stopping): (mpsc::Receiver<C>, CancellationToken),
    mut work: impl FnMut(Workplace<'_, C>) -> Option<Resize>,
) {
    runtime::set_priority(settings.purpose);
    let repacked =
        weights::repacked(settings).map_or_else(|| weights::find_faster(settings, header, request), Ok);
    let repacked = match repacked {
        Ok(repacked) => repacked,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let (before, began) = (measure::process(), Instant::now());
    let (loaded, shared) = match Loaded::load(settings, repacked, request) {
        Ok(loaded) => loaded,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let weights = measure::process();
    let n_ctx = request.estimate.n_ctx.unwrap_or(header.int("{arch}.context_length").unwrap_or(512) as u32);
    let projector = Held::default();
    // Ends with the thread, before the weights do.
    let (multimodal, projecting) = match start_projector(settings, header, &loaded, n_ctx, &projector) {
        Ok(started) => started.unzip(),
        Err(error) => return drop(ready.send(Err(error))),
    };
    let projected = measure::process();
    let (mut shape, mut context) = match context(settings, header, &loaded, n_ctx) {
        Ok(made) => made,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let alone = turn.was_alone();
    let load_time = began.elapsed();
    let holds = Arc::new(Holds {
        n_ctx: AtomicU32::new(usable(&shape, &context)),
        gained: Mutex::new(Gained {
            weights: gained_by_weights(settings, before, weights.filter(|_| alone)),
            context: measure::grown(projected).filter(|_| alone),
        }),
        growth: Growth::default(),
        projector,
    });
    if multimodal.is_some() {
        let anonymous = |at: Option<Footprint>| at.and_then(|at| at.anonymous);
        let grown =
            anonymous(projected).zip(anonymous(weights)).map(|(after, before)| after.saturating_sub(before));
        holds.projector.grew(grown.filter(|_| alone));
    }
    if alone {
        drop(turn);
    } else {
        let (expected, context) = expected_to_gain(&request.estimate, repacked, shared);
        let holds = Arc::downgrade(&holds);
        turn.end_among_others(expected + context, move |gained| {
            if let Some(holds) = holds.upgrade() {
                holds.hear(gained, expected, context);
            }
        });
    }
    if let Some(projecting) = &projecting {
        projecting.model_is_loaded();
    }
    let all = Ready { holds: Arc::clone(&holds), shared, loaded: Arc::downgrade(&loaded), multimodal };
    if ready.send(Ok(all)).is_err() {
        return;
    }
    let mut load_time = Some(load_time);
    loop {
        let mut growth = holds.growth.clone();
        let resize = work(Workplace {
            settings,
            header,
            shape: &shape,
            loaded: &loaded,
            context,
            growth: &mut growth,
            commands: &mut commands,
            stopping: &stopping,
        });
        let took = took_in_all(&request.estimate, &shape, &holds, growth.largest(), repacked);
        took::remember(settings, shape.n_ctx, took.filter(|_| !shared), load_time.take());
        let Some(Resize { n_ctx, activity, done }) = resize else { return };
        measure::trim();
        holds.growth.forget();
        let before = measure::process();
        (shape, context) = match self::context(settings, header, &loaded, n_ctx) {
            Ok(made) => made,
            // The engine is gone.
            Err(error) => return drop(done.send(Err(error))),
        };
        holds.n_ctx.store(usable(&shape, &context), Ordering::Relaxed);
        let grown = measure::grown(before).filter(|_| activity.was_alone());
        holds.gained.lock().unwrap_or_else(PoisonError::into_inner).context = grown;
        drop(activity);
        // Whoever asked has left: the context is there all the same.
        let _left = done.send(Ok(()));
    }
}

/// Loads the projector of a model that generates, where its settings name one.
fn start_projector(
    settings: &GgufSettings,
    header: &Header,
    loaded: &Arc<Loaded>,
    n_ctx: u32,
    held: &Held,
) -> Result<Option<(Multimodal, multimodal::Projecting)>, Error> {
    let Some(path) = settings.mmproj.as_ref().filter(|_| settings.purpose == Capability::Generate) else {
        return Ok(None);
    };
    let shape = estimate::shape(header, settings, n_ctx);
    let of_projector = multimodal::Settings {
        path: path.clone(),
        // The file may have changed since the model's size was asked for.
        projection: projector::check_projector(path, header.int("{arch}.embedding_length").unwrap_or(0))?,
        seed: record::number(path),
        threads: shape.threads,
        ttl: settings.projector_ttl,
        n_ctx: n_ctx as usize,
        n_batch: shape.n_batch as usize,
    };
    Multimodal::start(of_projector, loaded, held).map(Some)
}

fn context<'m>(
    settings: &GgufSettings,
    header: &Header,
    loaded: &'m Loaded,
    n_ctx: u32,
) -> Result<(Shape, Context<'m>), Error> {
    let shape = estimate::shape(header, settings, n_ctx);
    let context = Context::new(loaded, &shape);
    let mut context = context.ok_or_else(|| Error::ContextFailed { path: settings.path.clone(), n_ctx })?;
    context.set_adapters(&settings.lora)?;
    Ok((shape, context))
}

/// llama.cpp makes a context a little longer than asked; the steps of a model that reads whole texts are not.
fn usable(shape: &Shape, context: &Context<'_>) -> u32 {
    if shape.pooling.is_some() { shape.n_ctx } else { context.n_ctx() }
}

/// All that a model took with the context that it had: only where all of it was measured as its own, and its buffers were in
/// use, by a step of half the largest at least. Texts that are read whole share steps up to a size, beyond which a long one
/// alone goes: for these the estimate's buffers stand until there was one.
fn took_in_all(
    estimate: &Estimate,
    shape: &Shape,
    holds: &Holds,
    largest_step: usize,
    repacked: bool,
) -> Option<Bytes> {
    let held = holds.gained().filter(|held| held.exact)?;
    let in_use = |most: usize| largest_step >= most / 2;
    let untouched = match shape.pooling {
        _ if in_use(shape.n_batch as usize) => Bytes::ZERO,
        Some(_) if in_use(encoder::TOKENS) => estimate.compute.saturating_sub(holds.growth.bytes()),
        _ => return None,
    };
    // So has the projector, which may have had no work yet.
    let idle = estimate.projector.saturating_sub(holds.projector.most());
    // A page of a map that is not resident just now will be.
    let file = if repacked { held.file_backed } else { held.file_backed.max(estimate.weights) };
    Some(file + held.anonymous? + untouched + idle)
}

/// What a load is expected to add to the process's own memory for its weights, its projector among them, and for its context: no page of a map, and
/// nothing that others hold already. Compute buffers are touched later, by steps.
fn expected_to_gain(estimate: &Estimate, repacked: bool, shared: bool) -> (Bytes, Bytes) {
    let weights = if repacked && !shared { estimate.weights } else { Bytes::ZERO };
    let overhead = if shared { Bytes::ZERO } else { estimate.overhead };
    (weights + overhead + estimate.projector, estimate.kv)
}

/// What the process has gained by a model's weights: all that it grew by, where nothing else made it grow meanwhile. Else
/// what is resident of the file, which takes longer to find out, and of its own memory nobody knows.
fn gained_by_weights(
    settings: &GgufSettings,
    before: Option<Footprint>,
    alone: Option<Footprint>,
) -> Option<Footprint> {
    let grown = before.zip(alone).and_then(|(before, after)| {
        let anonymous = after.anonymous?.saturating_sub(before.anonymous?);
        let file_backed = after.file_backed.saturating_sub(before.file_backed);
        Some(Footprint { file_backed, anonymous: Some(anonymous), exact: true })
    });
    grown.or_else(|| {
        Some(Footprint { file_backed: measure::mapped(&settings.path)?, anonymous: None, exact: false })
    })
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

/// Without an unload the thread ends by itself: within its step, when it sees the token or that nobody can send.
impl<C> Drop for Thread<C> {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

impl<C: Send + 'static> fmt::Debug for Thread<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Thread")
            .field("path", &self.path)
            .field("n_ctx", &self.n_ctx())
            .finish_non_exhaustive()
    }
}

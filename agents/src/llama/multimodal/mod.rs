//! Images and audio for a model in this process. Its projector turns them into embeddings, which stand in the prompt beside
//! tokens; the engine puts both through the same steps.
//!
//! A projector has a thread of its own, so that neither the engine nor other models wait while it works: half a minute of
//! audio takes a 7B model's some seconds. What it made is kept for the next turns of a conversation, up to a bound. When it has
//! had nothing to do for a while, it gives its memory back and is loaded again when it is asked.

mod embedded;
mod mtmd;
#[cfg(test)]
mod reference;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use lru::LruCache;
use sarai_core::audio::Audio;
use sarai_core::image::Image;
use sarai_core::request::Capability;
use sarai_core::units::Bytes;
use tokio::sync::oneshot;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::load::Loaded;
use super::measure;
use super::projector::Projection;
use super::runtime::{self, Activity};
use super::thread::WAITING;
use crate::Error;
use crate::media::{picture, sound};
#[cfg(test)]
pub(super) use embedded::tests;
pub(super) use embedded::{Embedded, Piece};
use mtmd::{Mtmd, Seen};

/// What the embeddings that are kept for later turns may take, as a part of the whole context's.
pub(super) const KEPT_PART: usize = 2;

/// An image or audio of a request.
#[derive(Clone, Debug)]
pub(super) enum Medium {
    Image(Image),
    Audio(Audio),
}

/// What stands in a prompt for one image or audio, in its order.
pub(super) type Pieces = Arc<Vec<Piece>>;

/// A projector and its thread, from the rest of the engine. A cheap clone.
#[derive(Clone, Debug)]
pub(super) struct Multimodal {
    path: PathBuf,
    sees: bool,
    /// Samples a second, where it hears.
    sample_rate: Option<u32>,
    /// Of the projector: the same image means something else through another one.
    seed: u64,
    jobs: SyncSender<Job>,
    kept: Arc<Mutex<Kept>>,
}

/// What was made of images and audio, the least recently used going first.
#[derive(Debug)]
struct Kept {
    pieces: LruCache<u64, (Pieces, usize)>,
    bytes: usize,
    most: usize,
}

enum Job {
    Encode {
        medium: Medium,
        id: u64,
        most: usize,
        done: oneshot::Sender<Result<Vec<Piece>, Error>>,
    },
    /// The model's load is over: from now on the projector may be idle.
    Loaded,
    Stop,
}

/// What a projector holds of this process's memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Held(Arc<HeldBytes>);

#[derive(Debug, Default)]
struct HeldBytes {
    /// By what the process grew with its load and its work, while it is loaded.
    now: AtomicU64,
    /// The most that it held.
    most: AtomicU64,
    /// Something grew that could not be told apart.
    missed: AtomicU64,
}

/// The thread. Its drop ends it, and waits until the projector's memory is back.
#[derive(Debug)]
pub(super) struct Projecting {
    jobs: SyncSender<Job>,
    thread: Option<JoinHandle<()>>,
}

/// What a projector's thread is started with.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) path: PathBuf,
    pub(super) projection: Projection,
    /// The same for the same projector.
    pub(super) seed: u64,
    pub(super) threads: usize,
    /// Its memory is given back after it had nothing to do for so long; `None` keeps it.
    pub(super) ttl: Option<Duration>,
    /// Embeddings that the context has room for, and one step.
    pub(super) n_ctx: usize,
    pub(super) n_batch: usize,
}

impl Multimodal {
    /// Loads a projector on a thread of its own. What that adds to the process's memory its caller measures, as a part of the
    /// model's load.
    pub(super) fn start(
        settings: Settings,
        loaded: &Arc<Loaded>,
        held: &Held,
    ) -> Result<(Self, Projecting), Error> {
        let (jobs, work) = sync_channel(WAITING);
        let (ready, is_ready) = sync_channel(1);
        let most = settings.n_ctx / KEPT_PART * settings.projection.width * size_of::<f32>();
        let (path, seed, sees) = (settings.path.clone(), settings.seed, settings.projection.sees);
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let body = {
            let (loaded, held, span) = (Arc::clone(loaded), held.clone(), tracing::Span::current());
            move || {
                let _entered = span.entered();
                runtime::set_priority(Capability::Generate);
                let mut worker =
                    Worker { settings, loaded, held, mtmd: None, may_be_idle: false, largest: 0 };
                let rate = worker.load().map(|mtmd| mtmd.sample_rate());
                let failed = rate.is_err();
                // Whoever waits for it cannot be gone.
                let _heard = ready.send(rate);
                if !failed {
                    worker.run(&work);
                }
            }
        };
        let gone = || Error::EngineGone { path: path.clone() };
        let thread = std::thread::Builder::new().name(format!("mmproj-{stem}")).spawn(body);
        let thread = thread.map_err(|_| gone())?;
        let projecting = Projecting { jobs: jobs.clone(), thread: Some(thread) };
        let sample_rate = is_ready.recv().map_err(|_| gone()).flatten()?;
        let kept = Arc::new(Mutex::new(Kept { pieces: LruCache::unbounded(), bytes: 0, most }));
        Ok((Self { path, sees, sample_rate, seed, jobs, kept }, projecting))
    }

    /// Samples a second that the model wants of audio.
    pub(super) fn sample_rate(&self) -> Result<u32, Error> {
        self.sample_rate.ok_or(Error::CannotHear)
    }

    /// What stands in a prompt for an image or audio, where a context has room for `most` embeddings.
    ///
    /// # Cancel safety
    /// Cancel safe: what has not begun is not done.
    pub(super) async fn encode(&self, medium: Medium, most: usize) -> Result<Pieces, Error> {
        match &medium {
            Medium::Image(_) if !self.sees => return Err(Error::CannotSee),
            Medium::Audio(_) if self.sample_rate.is_none() => return Err(Error::CannotHear),
            Medium::Image(_) | Medium::Audio(_) => {}
        }
        let id = xxh3_64_with_seed(medium.bytes(), self.seed);
        if let Some(pieces) = self.kept().get(id) {
            return Ok(pieces);
        }
        let (done, is_done) = oneshot::channel();
        let gone = || Error::EngineGone { path: self.path.clone() };
        self.jobs.try_send(Job::Encode { medium, id, most, done }).map_err(|error| match error {
            // There is room for as many as requests may run.
            TrySendError::Full(_) => {
                Error::Compute { reason: "too many images and sounds at once".to_owned() }
            }
            TrySendError::Disconnected(_) => gone(),
        })?;
        let pieces = Arc::new(is_done.await.map_err(|_| gone()).flatten()?);
        self.kept().put(id, &pieces);
        Ok(pieces)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        // Nothing panics while it is held.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Medium {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Image(image) => image.bytes(),
            Self::Audio(audio) => audio.bytes(),
        }
    }
}

impl Kept {
    fn get(&mut self, id: u64) -> Option<Pieces> {
        self.pieces.get(&id).map(|(pieces, _)| Arc::clone(pieces))
    }

    fn put(&mut self, id: u64, pieces: &Pieces) {
        let bytes = pieces.iter().map(Piece::bytes).sum();
        if bytes > self.most {
            return;
        }
        self.bytes += bytes;
        if let Some((_, before)) = self.pieces.put(id, (Arc::clone(pieces), bytes)) {
            self.bytes -= before;
        }
        while self.bytes > self.most
            && let Some((_, (_, gone))) = self.pieces.pop_lru()
        {
            self.bytes -= gone;
        }
    }
}

impl Held {
    /// What it holds now.
    pub(super) fn now(&self) -> Bytes {
        Bytes(self.0.now.load(Ordering::Relaxed))
    }

    /// The most that it held since the model was loaded.
    pub(super) fn most(&self) -> Bytes {
        Bytes(self.0.most.load(Ordering::Relaxed))
    }

    /// Whether all of that was measured as its own.
    pub(super) fn is_exact(&self) -> bool {
        self.0.missed.load(Ordering::Relaxed) == 0
    }

    /// Notes by how much the process grew; `None` where that cannot be told apart.
    pub(super) fn grew(&self, by: Option<Bytes>) {
        match by {
            Some(by) => {
                let now = self.0.now.fetch_add(by.0, Ordering::Relaxed) + by.0;
                self.0.most.fetch_max(now, Ordering::Relaxed);
            }
            None => {
                self.0.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn gave_back(&self) {
        self.0.now.store(0, Ordering::Relaxed);
    }
}

impl Projecting {
    /// Says that the model's load is over, of which the projector's memory is a part.
    pub(super) fn model_is_loaded(&self) {
        // It has ended already, if this fails.
        let _ended = self.jobs.send(Job::Loaded);
    }
}

impl Drop for Projecting {
    fn drop(&mut self) {
        // It has ended already, if this fails.
        let _ended = self.jobs.send(Job::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the projector's thread panicked");
        }
    }
}

/// The thread's work.
struct Worker {
    settings: Settings,
    loaded: Arc<Loaded>,
    held: Held,
    mtmd: Option<Mtmd>,
    may_be_idle: bool,
    /// The most embeddings that were made at once: more may touch buffers for the first time.
    largest: usize,
}

impl Worker {
    fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            let job = match self.settings.ttl.filter(|_| self.mtmd.is_some() && self.may_be_idle) {
                Some(ttl) => jobs.recv_timeout(ttl),
                None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match job {
                Ok(Job::Encode { medium, id, most, done }) => {
                    if !done.is_closed() {
                        let made = self.encode(medium, id, most);
                        // Whoever asked may have left.
                        let _heard = done.send(made);
                    }
                }
                Ok(Job::Loaded) => self.may_be_idle = true,
                Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => self.give_back(),
            }
        }
    }

    fn load(&mut self) -> Result<&mut Mtmd, Error> {
        let Settings { path, projection, threads, n_batch, .. } = &self.settings;
        let mtmd = Mtmd::load(path, &self.loaded, (*threads, *n_batch), projection.any_size)?;
        self.largest = 0;
        Ok(self.mtmd.insert(mtmd))
    }

    /// Loads the projector again where it was given back.
    fn be_loaded(&mut self) -> Result<(), Error> {
        if self.mtmd.is_none() {
            let (activity, before) = (Activity::begin(), measure::process());
            self.load()?;
            self.held.grew(measure::grown(before).filter(|_| activity.was_alone()));
        }
        Ok(())
    }

    fn give_back(&mut self) {
        let _activity = Activity::begin();
        self.mtmd = None;
        measure::trim();
        self.held.gave_back();
        tracing::info!(path = %self.settings.path.display(), "the projector was idle and gave its memory back");
    }

    fn encode(&mut self, medium: Medium, id: u64, most: usize) -> Result<Vec<Piece>, Error> {
        self.be_loaded()?;
        let gone = || Error::EngineGone { path: self.settings.path.clone() };
        let mtmd = self.mtmd.as_mut().ok_or_else(gone)?;
        let rate = mtmd.sample_rate();
        let seen = match medium {
            Medium::Image(image) => Seen::Picture(picture::decode(&image)?),
            Medium::Audio(audio) => Seen::Sound(sound::decode(&audio, rate.ok_or(Error::CannotHear)?)?),
        };
        let fits = |tokens: usize| {
            let n_ctx = u32::try_from(most).unwrap_or(u32::MAX);
            if tokens < most { Ok(()) } else { Err(Error::PromptTooLong { tokens, n_ctx }) }
        };
        let (activity, before) = (Activity::begin(), measure::process());
        let pieces = runtime::working(|| mtmd.encode(&seen, id, fits))?;
        let made = pieces.iter().map(|piece| match piece {
            Piece::Tokens(_) => 0,
            Piece::Embedded(embedded) => embedded.len(),
        });
        let (made, bytes): (usize, usize) = (made.sum(), pieces.iter().map(Piece::bytes).sum());
        if made > self.largest {
            self.largest = made;
            // What was made is its caller's.
            let grown = measure::grown(before).map(|grown| grown.saturating_sub(Bytes(bytes as u64)));
            self.held.grew(grown.filter(|_| activity.was_alone()));
        }
        Ok(pieces)
    }
}

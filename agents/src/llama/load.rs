//! Loading a file's weights. Two models on one file, held in the same way, share them.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use llguidance::ParserFactory;
use sarai_core::backend::LoadRequest;
use sarai_core::memory::WeightsId;

use super::context::c_path;
use super::{GgufSettings, large_pages, runtime, weights};
use crate::Error;

/// A file's weights and vocabulary in memory. The last one who holds it frees them.
pub(super) struct Loaded {
    model: LlamaModel,
    path: PathBuf,
    /// Held by whoever changes the model, as making a context may.
    changes: Mutex<()>,
    /// The vocabulary as JSON schemas need it; made on first use, because that takes a while.
    schemas: OnceLock<Result<ParserFactory, String>>,
}

/// What two loads have to have in common to share their weights: the same file, unchanged, held in the same way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Identity {
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
    repacked: bool,
}

impl Loaded {
    /// Loads a file whose header was checked, with progress, until its caller stops it. Where the same weights are
    /// loaded already, or just being loaded, they are shared. Returns whether they are.
    pub(super) fn load(
        settings: &GgufSettings,
        repacked: bool,
        request: &LoadRequest,
    ) -> Result<(Arc<Self>, bool), Error> {
        let _backend = runtime::backend()?;
        let mut on_progress = |fraction: f32| {
            (request.progress)(fraction);
            !request.cancel.is_cancelled()
        };
        let path = settings.path.clone();
        if !on_progress(0.0) {
            return Err(Error::LoadCancelled { path });
        }
        let identity = Identity::of(settings, repacked)?;
        let loading = match Loading::begin(&identity, || request.cancel.is_cancelled()) {
            Begun::Shared(shared) => {
                on_progress(1.0);
                return Ok((shared, true));
            }
            Begun::Stopped => return Err(Error::LoadCancelled { path }),
            Begun::Own(loading) => loading,
        };
        let Some(model) = load(&settings.path, identity.repacked, &mut on_progress) else {
            let cancelled = request.cancel.is_cancelled();
            return Err(if cancelled { Error::LoadCancelled { path } } else { Error::LoadFailed { path } });
        };
        let loaded = Arc::new(Self { model, path, changes: Mutex::new(()), schemas: OnceLock::new() });
        loading.end(&loaded);
        Ok((loaded, false))
    }

    pub(super) fn model(&self) -> &LlamaModel {
        &self.model
    }

    /// Whether what a sequence has computed can only be gone on with as a whole, because it has a recurrent state.
    pub(super) fn is_recurrent(&self) -> bool {
        self.model.is_recurrent() || self.model.is_hybrid()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Does what may change the model, while nobody else does.
    pub(super) fn changing<T>(&self, change: impl FnOnce(NonNull<llama_cpp_sys_2::llama_model>) -> T) -> T {
        // Nothing that it guards is left half done by a panic.
        let _changing = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        change(self.raw())
    }

    #[expect(unsafe_code, reason = "the binding does not give its pointer")]
    pub(super) fn raw(&self) -> NonNull<llama_cpp_sys_2::llama_model> {
        // SAFETY: `LlamaModel` is a transparent wrapper of this very pointer; the binding's version is pinned.
        unsafe { *std::ptr::from_ref(&self.model).cast() }
    }

    /// Reads JSON schemas for this vocabulary.
    pub(super) fn schemas(&self) -> Result<&ParserFactory, Error> {
        let made = self.schemas.get_or_init(|| {
            let tokens = LlamaSampler::llguidance_tok_env(&self.model);
            let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| error.to_string())?;
            factory.quiet();
            Ok(factory)
        });
        made.as_ref().map_err(|reason| Error::BadSchema { reason: reason.clone() })
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The same for two models that [`Loaded::load`] gives the same weights; none while it is open how they are held.
pub(super) fn weights_id(settings: &GgufSettings) -> Result<Option<WeightsId>, Error> {
    let Some(repacked) = weights::repacked(settings) else { return Ok(None) };
    Ok(Some(WeightsId::new(format!("{:?}", Identity::of(settings, repacked)?))))
}

impl Identity {
    fn of(settings: &GgufSettings, repacked: bool) -> Result<Self, Error> {
        let path = &settings.path;
        let read = |source| Error::ReadFile { path: path.clone(), source };
        let metadata = std::fs::metadata(path).map_err(read)?;
        Ok(Self {
            path: std::fs::canonicalize(path).map_err(read)?,
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
            repacked,
        })
    }
}

/// How often a load that waits for another one's weights looks whether its caller stops it.
const LOOKS: Duration = Duration::from_millis(50);

/// The weights in memory, and those on their way there. An LLM and a helper on one file load side by side: the second one
/// waits for the first one's weights instead of reading them again.
static SHARED: Mutex<BTreeMap<Identity, Weights>> = Mutex::new(BTreeMap::new());
static ENDED: Condvar = Condvar::new();

enum Weights {
    Loading,
    Loaded(Weak<Loaded>),
}

/// A load of weights that nobody has yet. However it ends, those who wait for it go on.
struct Loading<'i>(&'i Identity);

enum Begun<'i> {
    Shared(Arc<Loaded>),
    Own(Loading<'i>),
    /// By its caller, while it waited.
    Stopped,
}

impl<'i> Loading<'i> {
    fn begin(identity: &'i Identity, stops: impl Fn() -> bool) -> Begun<'i> {
        let mut all = shared();
        loop {
            match all.get(identity) {
                Some(Weights::Loaded(loaded)) => {
                    if let Some(loaded) = loaded.upgrade() {
                        return Begun::Shared(loaded);
                    }
                }
                Some(Weights::Loading) if stops() => return Begun::Stopped,
                Some(Weights::Loading) => {
                    all = ENDED.wait_timeout(all, LOOKS).unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                }
                None => {}
            }
            all.insert(identity.clone(), Weights::Loading);
            return Begun::Own(Self(identity));
        }
    }

    fn end(self, loaded: &Arc<Loaded>) {
        let mut all = shared();
        all.retain(|_, weights| match weights {
            Weights::Loading => true,
            Weights::Loaded(held) => held.strong_count() > 0,
        });
        all.insert(self.0.clone(), Weights::Loaded(Arc::downgrade(loaded)));
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut all = shared();
        if matches!(all.get(self.0), Some(Weights::Loading)) {
            all.remove(self.0);
        }
        ENDED.notify_all();
    }
}

fn shared() -> MutexGuard<'static, BTreeMap<Identity, Weights>> {
    // Nothing panics while it is held.
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads a model with the weights held as asked; `None` where llama.cpp refuses the file or `on_progress` says to stop.
///
/// A plain map of the file does without the second copy that llama.cpp repacks for the CPU by default; that copy can only
/// be left out through `use_extra_bufts`, which the binding has no setter for. Repacked weights are the copy without the
/// map.
#[expect(unsafe_code, reason = "the binding cannot switch repacking off")]
fn load(path: &Path, repacked: bool, on_progress: &mut dyn FnMut(f32) -> bool) -> Option<LlamaModel> {
    unsafe extern "C" fn trampoline(fraction: f32, callback: *mut c_void) -> bool {
        // SAFETY: `callback` is the pointer given below; it lives until the load returns, and llama.cpp calls this from
        // the loading thread only.
        let callback = unsafe { &mut *callback.cast::<&mut dyn FnMut(f32) -> bool>() };
        callback(fraction)
    }

    let path = c_path(path)?;
    let mut before = repacked.then(large_pages::Before::now);
    let mut on_progress = |fraction| {
        // The first that is heard: the weights' memory is reserved, and nothing is written to it yet.
        if let Some(before) = before.take() {
            before.ask_for_what_is_new();
        }
        on_progress(fraction)
    };
    let mut callback: &mut dyn FnMut(f32) -> bool = &mut on_progress;
    // SAFETY: plain function that returns a struct of defaults.
    let mut params = unsafe { llama_cpp_sys_2::llama_model_default_params() };
    params.use_extra_bufts = repacked && runtime::can_repack();
    params.load_mode =
        if repacked { llama_cpp_sys_2::LLAMA_LOAD_MODE_NONE } else { llama_cpp_sys_2::LLAMA_LOAD_MODE_MMAP };
    params.progress_callback = Some(trampoline);
    params.progress_callback_user_data = std::ptr::from_mut(&mut callback).cast();
    // SAFETY: llama.cpp was started (`runtime::backend`), the path is a C string, and the parameters hold no pointer
    // but the callback's, which outlives the call.
    let model = unsafe { llama_cpp_sys_2::llama_load_model_from_file(path.as_ptr(), params) };
    if model.is_null() {
        return None;
    }
    // SAFETY: `LlamaModel` is a transparent wrapper of a non-null pointer to a model that it owns and frees; the
    // binding's version is pinned, so that this stays true.
    Some(unsafe { std::mem::transmute::<*mut llama_cpp_sys_2::llama_model, LlamaModel>(model) })
}

#[cfg(test)]
mod tests {
    use sarai_core::memory::Estimate;
    use sarai_core::request::Capability;
    use sarai_support::gguf::{Kind, Model};
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn request(cancel: CancellationToken) -> LoadRequest {
        LoadRequest { cancel, ..LoadRequest::new(Estimate::default()) }
    }

    #[test]
    fn a_file_that_is_loaded_in_the_same_way_is_loaded_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        Model::new(Kind::Llama).write_to(&path).unwrap();
        let settings = GgufSettings::new(&path, Capability::Generate);
        let request = request(CancellationToken::new());
        let load = |repacked| Loaded::load(&settings, repacked, &request).unwrap().0;
        let first = load(false);
        assert!(Arc::ptr_eq(&first, &load(false)));
        assert!(!Arc::ptr_eq(&first, &load(true)), "held in another way");
        drop(first);
        Model::new(Kind::Llama).n_layer(3).write_to(&path).unwrap();
        let changed = load(false);
        assert_eq!(changed.model().n_layer(), 3, "another file by now");
    }

    type Outcome = Result<(Arc<Loaded>, bool), Error>;

    /// Runs `second` while a first load of the same file stands still at its beginning; `goes_on` lets that go on.
    fn beside_a_load(
        fails: bool,
        second: impl FnOnce(&GgufSettings, &dyn Fn()) -> Outcome,
    ) -> (Outcome, Outcome) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        Model::new(Kind::Llama).write_to(&path).unwrap();
        let settings = GgufSettings::new(&path, Capability::Generate);
        let (begun, has_begun) = std::sync::mpsc::sync_channel(1);
        let (go_on, may_go_on) = std::sync::mpsc::sync_channel::<()>(1);
        let may_go_on = Mutex::new(may_go_on);
        let cancel = CancellationToken::new();
        let hold = {
            let cancel = cancel.clone();
            let begun = Mutex::new(Some(begun));
            move |fraction: f32| {
                // The first report comes before the load has begun.
                if fraction > 0.0
                    && let Some(begun) = begun.lock().unwrap().take()
                {
                    begun.send(()).unwrap();
                    if may_go_on.lock().unwrap().recv().is_ok() && fails {
                        cancel.cancel();
                    }
                }
            }
        };
        let first = LoadRequest { cancel, progress: Arc::new(hold), ..LoadRequest::new(Estimate::default()) };
        std::thread::scope(|scope| {
            let first = scope.spawn(|| Loaded::load(&settings, true, &first));
            has_begun.recv().unwrap();
            let second = second(&settings, &|| go_on.send(()).unwrap());
            drop(go_on);
            (first.join().unwrap(), second)
        })
    }

    #[test]
    fn two_loads_of_a_file_at_once_read_it_once() {
        let second = |settings: &GgufSettings, go_on: &dyn Fn()| {
            go_on();
            Loaded::load(settings, true, &request(CancellationToken::new()))
        };
        let (first, second) = beside_a_load(false, second);
        let ((first, first_shared), (second, second_shared)) = (first.unwrap(), second.unwrap());
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!((first_shared, second_shared), (false, true));
    }

    #[test]
    fn a_load_that_waits_for_another_ones_weights_hears_its_own_cancel_and_that_the_other_has_failed() {
        let cancelled = |settings: &GgufSettings, _: &dyn Fn()| {
            let cancel = CancellationToken::new();
            let request = request(cancel.clone());
            std::thread::scope(|scope| {
                let waits = scope.spawn(|| Loaded::load(settings, true, &request));
                cancel.cancel();
                waits.join().unwrap()
            })
        };
        let (first, second) = beside_a_load(false, cancelled);
        assert!(matches!(second, Err(Error::LoadCancelled { .. })), "{second:?}");
        assert!(first.is_ok());
        let loads_itself = |settings: &GgufSettings, go_on: &dyn Fn()| {
            go_on();
            Loaded::load(settings, true, &request(CancellationToken::new()))
        };
        let (first, second) = beside_a_load(true, loads_itself);
        assert!(matches!(first, Err(Error::LoadCancelled { .. })), "{first:?}");
        assert!(!second.unwrap().1, "it has read the file itself");
    }
}

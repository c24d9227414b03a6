//! Loading a file's weights. Two models on one file, held in the same way, share them.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use llguidance::ParserFactory;
use sarai_core::backend::LoadRequest;
use sarai_core::memory::WeightsId;

use super::context::c_path;
use super::{GgufSettings, runtime, weights};
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
    /// loaded already, they are shared.
    pub(super) fn load(
        settings: &GgufSettings,
        repacked: bool,
        request: &LoadRequest,
    ) -> Result<Arc<Self>, Error> {
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
        if let Some(shared) = shared().get(&identity).and_then(Weak::upgrade) {
            on_progress(1.0);
            return Ok(shared);
        }
        let Some(model) = load(&settings.path, identity.repacked, &mut on_progress) else {
            let cancelled = request.cancel.is_cancelled();
            return Err(if cancelled { Error::LoadCancelled { path } } else { Error::LoadFailed { path } });
        };
        let loaded = Arc::new(Self { model, path, changes: Mutex::new(()), schemas: OnceLock::new() });
        let mut shared = shared();
        shared.retain(|_, held| held.strong_count() > 0);
        shared.insert(identity, Arc::downgrade(&loaded));
        Ok(loaded)
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
    fn raw(&self) -> NonNull<llama_cpp_sys_2::llama_model> {
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

/// The weights in memory. A load that runs beside one of the same file, in the other lane, is not shared: it costs
/// memory that both have reserved, and nothing else.
fn shared() -> std::sync::MutexGuard<'static, BTreeMap<Identity, Weak<Loaded>>> {
    static SHARED: Mutex<BTreeMap<Identity, Weak<Loaded>>> = Mutex::new(BTreeMap::new());
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
    let mut callback = on_progress;
    // SAFETY: plain function that returns a struct of defaults.
    let mut params = unsafe { llama_cpp_sys_2::llama_model_default_params() };
    params.use_extra_bufts = repacked;
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

    #[test]
    fn a_file_that_is_loaded_in_the_same_way_is_loaded_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        Model::new(Kind::Llama).write_to(&path).unwrap();
        let settings = GgufSettings::new(&path, Capability::Generate);
        let request = LoadRequest::new(Estimate::default());
        let load = |repacked| Loaded::load(&settings, repacked, &request).unwrap();
        let first = load(false);
        assert!(Arc::ptr_eq(&first, &load(false)));
        assert!(!Arc::ptr_eq(&first, &load(true)), "held in another way");
        drop(first);
        Model::new(Kind::Llama).n_layer(3).write_to(&path).unwrap();
        let changed = load(false);
        assert_eq!(changed.model().n_layer(), 3, "another file by now");
    }
}

use std::ffi::{CString, c_void};
use std::num::NonZeroU32;
use std::path::Path;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{LlamaContextParams, LlamaPoolingType};
use llama_cpp_2::model::LlamaModel;
use sarai_core::backend::LoadRequest;
use sarai_core::config::Weights;
use sarai_core::request::Capability;

use super::GgufSettings;
use super::header::Header;
use super::{estimate, runtime};
use crate::Error;

/// Loads a file whose header was checked, with progress, until its caller stops it.
pub(super) fn model(settings: &GgufSettings, request: &LoadRequest) -> Result<LlamaModel, Error> {
    let _backend = runtime::backend()?;
    let mut on_progress = |fraction: f32| {
        (request.progress)(fraction);
        !request.cancel.is_cancelled()
    };
    if !on_progress(0.0) {
        return Err(Error::LoadCancelled { path: settings.path.clone() });
    }
    let loaded = load(&settings.path, settings.weights, &mut on_progress);
    loaded.ok_or_else(|| {
        let path = settings.path.clone();
        if request.cancel.is_cancelled() { Error::LoadCancelled { path } } else { Error::LoadFailed { path } }
    })
}

/// A context for what the model is wanted for.
pub(super) fn context<'a>(
    model: &'a LlamaModel,
    header: &Header,
    settings: &GgufSettings,
    n_ctx: u32,
) -> Result<LlamaContext<'a>, Error> {
    let threads = i32::try_from(settings.threads.unwrap_or_else(runtime::cpus)).unwrap_or(1);
    let step = estimate::step(header, settings.purpose, n_ctx);
    let mut params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(n_ctx))
        .with_n_batch(step)
        .with_n_ubatch(step)
        .with_n_seq_max(1)
        .with_n_threads(threads)
        .with_n_threads_batch(threads)
        .with_no_perf(true)
        .with_embeddings(settings.purpose != Capability::Generate);
    match settings.purpose {
        // A model without a pooling of its own, as most that generate.
        Capability::Embed if header.int("{arch}.pooling_type").is_none_or(|pooling| pooling == 0) => {
            params = params.with_pooling_type(LlamaPoolingType::Mean);
        }
        Capability::Classify => params = params.with_pooling_type(LlamaPoolingType::Rank),
        Capability::Generate | Capability::Embed => {}
    }
    model.new_context(runtime::backend()?, params).map_err(|source| Error::ContextFailed {
        path: settings.path.clone(),
        n_ctx,
        source,
    })
}

/// Loads a model with the weights held as asked; `None` where llama.cpp refuses the file or `on_progress` says to stop.
///
/// `mmap` is the plain map of the file, without the second copy that llama.cpp repacks for the CPU by default; that
/// copy can only be left out through `use_extra_bufts`, which the binding has no setter for. `repack` has the copy and
/// not the map.
#[expect(unsafe_code, reason = "the binding cannot switch repacking off")]
fn load(path: &Path, weights: Weights, on_progress: &mut dyn FnMut(f32) -> bool) -> Option<LlamaModel> {
    unsafe extern "C" fn trampoline(fraction: f32, callback: *mut c_void) -> bool {
        // SAFETY: `callback` is the pointer given below; it lives until the load returns, and llama.cpp calls this from
        // the loading thread only.
        let callback = unsafe { &mut *callback.cast::<&mut dyn FnMut(f32) -> bool>() };
        callback(fraction)
    }

    let path = CString::new(path.to_str()?).ok()?;
    let mut callback = on_progress;
    // SAFETY: plain function that returns a struct of defaults.
    let mut params = unsafe { llama_cpp_sys_2::llama_model_default_params() };
    let repack = weights == Weights::Repack;
    params.use_extra_bufts = repack;
    params.load_mode =
        if repack { llama_cpp_sys_2::LLAMA_LOAD_MODE_NONE } else { llama_cpp_sys_2::LLAMA_LOAD_MODE_MMAP };
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

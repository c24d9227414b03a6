//! What this process has once for all models: llama.cpp itself, the lock for loads, the CPUs.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use llama_cpp_2::LogOptions;
use llama_cpp_2::llama_backend::LlamaBackend;

use crate::Error;

/// llama.cpp, started on first use and kept to the end: its drop would free it under models still loaded. Its log goes
/// to `tracing`.
pub(super) fn backend() -> Result<&'static LlamaBackend, Error> {
    static BACKEND: OnceLock<Result<LlamaBackend, Arc<llama_cpp_2::LlamaCppError>>> = OnceLock::new();
    let started = BACKEND.get_or_init(|| {
        llama_cpp_2::send_logs_to_tracing(LogOptions::default());
        LlamaBackend::init().map_err(Arc::new)
    });
    started.as_ref().map_err(|source| Error::Runtime { source: Arc::clone(source) })
}

/// Held while a model is loaded. llama.cpp does not promise that loads may overlap, and what a load adds to this
/// process's memory can only be measured while no other one runs.
pub(super) fn load_lock() -> MutexGuard<'static, ()> {
    static LOADING: Mutex<()> = Mutex::new(());
    // A load that panicked left nothing behind that the next one would see.
    LOADING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// CPUs that this process may use: its affinity mask, or its control group's quota where that is less.
pub(super) fn cpus() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cgroup_cpus().map_or(allowed, |quota| quota.min(allowed)).max(1)
}

/// The quota of cgroup v2 in whole CPUs, rounded up.
fn cgroup_cpus() -> Option<usize> {
    let text = std::fs::read_to_string("/sys/fs/cgroup/cpu.max").ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    Some((quota / period).ceil().max(1.0) as usize)
}

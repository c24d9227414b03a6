//! What this process has once for all models: llama.cpp itself, the turns of loads, the CPUs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use llama_cpp_2::LogOptions;
use llama_cpp_2::llama_backend::LlamaBackend;
use tokio::sync::{Mutex, MutexGuard};

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

/// A load's turn. LLMs load one after another, helpers too, but a helper never waits for an LLM: its own load is short.
/// llama.cpp reads and maps files side by side; only the process's growth cannot be told apart then.
pub(super) struct LoadTurn {
    /// How many overlaps there had been when this load began.
    overlaps: usize,
    _turn: MutexGuard<'static, ()>,
}

/// Loads in progress, and how often one began while another was.
static LOADING: AtomicUsize = AtomicUsize::new(0);
static OVERLAPS: AtomicUsize = AtomicUsize::new(0);

impl LoadTurn {
    /// Waits for the turn of an LLM or a helper.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn wait(helper: bool) -> Self {
        static LLMS: Mutex<()> = Mutex::const_new(());
        static HELPERS: Mutex<()> = Mutex::const_new(());
        let turn = if helper { HELPERS.lock().await } else { LLMS.lock().await };
        let before = OVERLAPS.load(Ordering::SeqCst);
        if LOADING.fetch_add(1, Ordering::SeqCst) > 0 {
            OVERLAPS.fetch_add(1, Ordering::SeqCst);
        }
        Self { overlaps: before, _turn: turn }
    }

    /// Whether no other load has run since this one began: what the process has grown by is this load's then.
    pub(super) fn was_alone(&self) -> bool {
        OVERLAPS.load(Ordering::SeqCst) == self.overlaps
    }
}

impl Drop for LoadTurn {
    fn drop(&mut self) {
        LOADING.fetch_sub(1, Ordering::SeqCst);
    }
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

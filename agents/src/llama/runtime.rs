//! What this process has once for all models: llama.cpp itself, the turns of loads, the CPUs and who gets how many.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use llama_cpp_2::llama_backend::LlamaBackend;
use sarai_core::request::Capability;
use sarai_core::units::Bytes;
use tokio::sync::{Mutex, MutexGuard};

use super::context::Step;
use super::measure::{self, Growth};
use crate::Error;

/// llama.cpp's version, by the binding that brings it.
pub(super) const LLAMA_CPP: &str = "llama-cpp-sys-2 0.1.161";

/// What computes: llama.cpp's version, this CPU, and what of it the build uses.
pub(super) fn engine() -> &'static str {
    static ENGINE: OnceLock<String> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let names =
            cpus.lines().filter(|line| line.starts_with("model name") || line.starts_with("CPU part"));
        let name = names.filter_map(|line| line.split_once(':')).map(|(_, name)| name.trim()).next();
        let features = [
            ("avx2", cfg!(target_feature = "avx2")),
            ("avx512f", cfg!(target_feature = "avx512f")),
            ("avx512vnni", cfg!(target_feature = "avx512vnni")),
            ("dotprod", cfg!(target_feature = "dotprod")),
            ("i8mm", cfg!(target_feature = "i8mm")),
        ];
        let used: Vec<&str> = features.iter().filter(|(_, used)| *used).map(|(name, _)| *name).collect();
        let arch = std::env::consts::ARCH;
        format!("{LLAMA_CPP} {arch} {} [{}]", name.unwrap_or("unknown"), used.join(" "))
    })
}

/// llama.cpp, started on first use and kept to the end: its drop would free it under models still loaded. Its log goes
/// to `tracing`.
pub(super) fn backend() -> Result<&'static LlamaBackend, Error> {
    static BACKEND: OnceLock<Result<LlamaBackend, Arc<llama_cpp_2::LlamaCppError>>> = OnceLock::new();
    let started = BACKEND.get_or_init(|| {
        super::log::send_to_tracing();
        measure::give_large_blocks_back();
        LlamaBackend::init().map_err(Arc::new)
    });
    started.as_ref().map_err(|source| Error::Runtime { source: Arc::clone(source) })
}

/// Whether weights can be repacked for the CPU. Not where llama.cpp was built with its kernels for AMX, which it would repack
/// for: built by GCC before 15 they end the process (llama.cpp pull request 26954), and nothing here can tell who built them.
#[expect(unsafe_code, reason = "the binding does not tell")]
pub(super) fn can_repack() -> bool {
    static WITH_AMX: OnceLock<bool> = OnceLock::new();
    !*WITH_AMX.get_or_init(|| {
        // SAFETY: a plain function without arguments.
        let with_amx = unsafe { llama_cpp_sys_2::ggml_cpu_has_amx_int8() } != 0;
        if with_amx {
            tracing::warn!(
                "llama.cpp was built with kernels for AMX, which may crash: weights are not repacked, and prompts are read more \
                 slowly. Build it with CFLAGS and CXXFLAGS set to -U__AMX_INT8__"
            );
        }
        with_amx
    })
}

/// A load's turn. LLMs load one after another, helpers too, but a helper waits for an LLM only where both are on one file:
/// its own load is short. llama.cpp reads and maps files side by side.
pub(super) struct LoadTurn {
    activity: Activity,
    _turn: MutexGuard<'static, ()>,
}

impl LoadTurn {
    /// Waits for the turn of an LLM or a helper.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn wait(helper: bool) -> Self {
        static LLMS: Mutex<()> = Mutex::const_new(());
        static HELPERS: Mutex<()> = Mutex::const_new(());
        let turn = if helper { HELPERS.lock().await } else { LLMS.lock().await };
        Self { activity: Activity::begin(), _turn: turn }
    }

    /// Whether nothing else was active since this load began: what the process has grown by is this load's then.
    pub(super) fn was_alone(&self) -> bool {
        self.activity.was_alone()
    }

    /// Ends the turn of a load that ran beside others, and is expected to have added so much. When the last of them is
    /// over, `hears` gets this one's part of what the process has grown by meanwhile; never, where something else than loads
    /// ran, too.
    pub(super) fn end_among_others(self, expected: Bytes, hears: impl FnOnce(Bytes) + Send + 'static) {
        Activity::counts().group.loads.push((expected, Box::new(hears)));
    }
}

/// A load, an unload, or a step that touches buffers for the first time, in progress. Each changes what the process holds.
#[derive(Debug)]
pub(super) struct Activity {
    /// How many had begun, this one included.
    number: u64,
    /// Whether no other one was in progress when it began.
    alone: bool,
}

struct Counts {
    begun: u64,
    in_progress: u64,
    group: Group,
}

/// Who is told what a load has added.
type Hears = Box<dyn FnOnce(Bytes) + Send>;

/// What ran since nothing else did.
struct Group {
    /// How many activities it had.
    activities: usize,
    /// The process's own memory when it began.
    before: Option<Bytes>,
    /// The loads that have ended: what each was expected to add, and who hears what it did.
    loads: Vec<(Bytes, Hears)>,
}

impl Group {
    const NEW: Self = Self { activities: 0, before: None, loads: Vec::new() };

    /// Shares out what was gained, where all of it were loads.
    fn share_out(self) {
        let expected: u128 = self.loads.iter().map(|(expected, _)| u128::from(expected.0)).sum();
        let now = measure::process().and_then(|now| now.anonymous);
        let Some((before, now)) = self.before.zip(now) else { return };
        if self.loads.len() != self.activities || expected == 0 {
            return;
        }
        let gained = u128::from(now.saturating_sub(before).0);
        for (own, hears) in self.loads {
            let part = gained * u128::from(own.0) / expected;
            hears(Bytes(u64::try_from(part).unwrap_or(u64::MAX)));
        }
    }
}

impl Activity {
    pub(super) fn begin() -> Self {
        let mut counts = Self::counts();
        counts.begun += 1;
        counts.in_progress += 1;
        let alone = counts.in_progress == 1;
        if alone {
            counts.group = Group { before: measure::process().and_then(|now| now.anonymous), ..Group::NEW };
        }
        counts.group.activities += 1;
        Self { number: counts.begun, alone }
    }

    /// Whether nothing else was in progress since it began.
    pub(super) fn was_alone(&self) -> bool {
        self.alone && Self::counts().begun == self.number
    }

    fn counts() -> std::sync::MutexGuard<'static, Counts> {
        static COUNTS: std::sync::Mutex<Counts> =
            std::sync::Mutex::new(Counts { begun: 0, in_progress: 0, group: Group::NEW });
        // Nothing panics while it is held.
        COUNTS.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        let ended = {
            let mut counts = Self::counts();
            counts.in_progress -= 1;
            (counts.in_progress == 0).then(|| std::mem::replace(&mut counts.group, Group::NEW))
        };
        if let Some(group) = ended.filter(|group| !group.loads.is_empty()) {
            group.share_out();
        }
    }
}

/// Whether steps are computed by GNU OpenMP's threads. These are counted for the whole process and stop spinning when
/// there are more of them than CPUs, so that several models compute side by side at full threads. ggml's own threads, and
/// those of another OpenMP, spin whatever happens: models then share the CPUs out.
pub(super) fn gnu_openmp() -> bool {
    static LINKED: OnceLock<bool> = OnceLock::new();
    // Which library serves llama.cpp is the linker's choice; what this process has mapped tells it.
    let linked = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        maps.lines().any(|line| line.contains("/libgomp"))
    };
    cfg!(feature = "openmp") && *LINKED.get_or_init(linked)
}

/// Computes a step of so many tokens of a model that would like so many threads, with as many as it gets. One that is larger
/// than all before it touches buffers for the first time; it counts as over before anyone hears of its result, so that a
/// load that follows is alone. The others leave the process's memory as it is.
pub(super) fn computing(
    threads: usize,
    growth: &mut Growth,
    tokens: usize,
    step: impl FnOnce(usize) -> Result<Step, Error>,
) -> Result<Step, Error> {
    let grows = growth.grows(tokens).then(|| (Activity::begin(), measure::process()));
    let (_at_work, models) = AtWork::begin();
    let result = step(if free_running() || gnu_openmp() { threads } else { (threads / models).max(1) });
    if let Some((activity, before)) = grows {
        let added = measure::grown(before).filter(|_| activity.was_alone());
        growth.after(tokens, added, matches!(result, Ok(Step::Done)));
    }
    result
}

/// Computes something beside the models' steps, such as an image's embeddings: counts as a model at work meanwhile.
pub(super) fn working<T>(work: impl FnOnce() -> T) -> T {
    let _at_work = AtWork::begin();
    work()
}

/// A model that computes a step, until this is dropped.
struct AtWork;

impl AtWork {
    /// One more, and how many that makes.
    fn begin() -> (Self, usize) {
        (Self, MODELS_AT_WORK.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        MODELS_AT_WORK.fetch_sub(1, Ordering::Relaxed);
    }
}

static MODELS_AT_WORK: AtomicUsize = AtomicUsize::new(0);

/// Whether nothing is arranged between models; see [`set_free_running`].
static FREE_RUNNING: AtomicBool = AtomicBool::new(false);

/// Has every model that is loaded from now on compute as it would alone: at the process's own priority, on all its
/// threads. For measurements of what the arrangement gains.
pub fn set_free_running(free: bool) {
    FREE_RUNNING.store(free, Ordering::Relaxed);
}

fn free_running() -> bool {
    FREE_RUNNING.load(Ordering::Relaxed)
}

/// How much an LLM's threads stand back behind a helper's, in the system's niceness.
const LLM_NICENESS: i32 = 10;

/// Sets the priority of this thread, and of those that it starts: an LLM's stand back, so that an embedding or a
/// classification, which someone waits for, is quick beside an LLM that keeps all CPUs busy for minutes.
pub(super) fn set_priority(purpose: Capability) {
    if purpose != Capability::Generate || free_running() {
        return;
    }
    // Linux has a niceness for each thread; elsewhere it would be the whole process's.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, LLM_NICENESS) {
        tracing::debug!(%error, "the priority of an LLM's threads stays as it is");
    }
}

/// CPUs that this process may use: its affinity mask, or the quota of its control group where that is less. The standard
/// library reads the quotas of both versions of control groups, and of all groups that this one is in, in whole CPUs.
pub(super) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_panics_leaves_the_others_their_threads() {
        let mut growth = Growth::default();
        let models = MODELS_AT_WORK.load(Ordering::Relaxed);
        let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            computing(2, &mut growth, 1, |_| panic!("on purpose"))
        }));
        assert!(panics.is_err());
        assert_eq!(MODELS_AT_WORK.load(Ordering::Relaxed), models);
    }

    #[cfg(all(feature = "openmp", target_os = "linux", target_env = "gnu"))]
    #[test]
    fn the_openmp_that_is_linked_is_seen() {
        assert!(gnu_openmp(), "these builds link GNU's");
    }
}

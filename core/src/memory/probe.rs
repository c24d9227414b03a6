use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use futures::stream::{self, BoxStream, StreamExt};
use serde::Serialize;
use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, System};

use super::cgroup;
use crate::units::Bytes;

/// The machine's memory, as its kernel reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SystemMemory {
    /// What this process could ever get: the machine's memory, or its control group's limit where that is smaller.
    pub total: Bytes,
    /// What could be had now without pushing anything out: the least of what the machine has free, the page cache
    /// included, and what each control group leaves.
    pub available: Bytes,
    /// What this process holds (resident set).
    pub process: Bytes,
    /// The part of it that is not a file's: it would be free were this process gone. Zero where the platform does not
    /// tell.
    pub process_anonymous: Bytes,
}

impl SystemMemory {
    /// What this process could hold just now: what is available, and what it has of its own. Pages of files count as
    /// available, its own included, so that this does not change with what this process loads.
    #[must_use]
    pub fn attainable(&self) -> Bytes {
        self.available + self.process_anonymous
    }
}

/// Where memory figures come from. Tests script it.
pub trait Probe: fmt::Debug + Send + Sync + 'static {
    /// The figures of this moment; `None` where the platform does not tell.
    fn read(&self) -> Option<SystemMemory>;

    /// An item each time that the system says that programs wait for memory; never ends. Called on a tokio runtime.
    fn pressure(&self) -> BoxStream<'static, ()> {
        stream::pending().boxed()
    }
}

/// The real machine.
pub struct SystemProbe {
    system: Option<Mutex<System>>,
}

impl SystemProbe {
    /// A probe of this machine and process.
    #[must_use]
    pub fn new() -> Self {
        Self { system: System::new().ok().map(Mutex::new) }
    }
}

impl Default for SystemProbe {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SystemProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemProbe").finish_non_exhaustive()
    }
}

impl Probe for SystemProbe {
    fn read(&self) -> Option<SystemMemory> {
        // A panic elsewhere leaves the figures as good as before: they are read anew here.
        let mut system = self.system.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        let mut memory = SystemMemory {
            total: Bytes(system.total_memory()),
            available: Bytes(system.available_memory()),
            process: Bytes::ZERO,
            process_anonymous: process_anonymous().unwrap_or_default(),
        };
        if let Some(group) = cgroup::tightest(Path::new("/")) {
            memory.total = memory.total.min(group.limit);
            memory.available = memory.available.min(group.available);
        }
        if let Ok(pid) = sysinfo::get_current_pid() {
            let what = ProcessRefreshKind::nothing().with_memory();
            system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, what);
            memory.process = system.process(pid).map_or(Bytes::ZERO, |process| Bytes(process.memory()));
        }
        Some(memory)
    }

    #[cfg(target_os = "linux")]
    fn pressure(&self) -> BoxStream<'static, ()> {
        super::psi::pressure()
    }
}

/// `RssAnon` of this process; `None` on other systems than Linux.
fn process_anonymous() -> Option<Bytes> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| Bytes(kilobytes * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_probe_sees_this_process_and_machine() {
        let memory = SystemProbe::new().read().unwrap();
        assert!(memory.process > Bytes(100_000), "{memory:?}");
        #[cfg(target_os = "linux")]
        assert!((Bytes(100_000)..=memory.process).contains(&memory.process_anonymous), "{memory:?}");
        assert!(memory.total >= memory.available && memory.available > Bytes::ZERO, "{memory:?}");
    }
}

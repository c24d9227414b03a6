use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, System};

use crate::units::Bytes;

/// The machine's memory, as its kernel reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SystemMemory {
    /// What this process could ever get: the machine's memory, or its control group's limit where that is smaller.
    pub total: Bytes,
    /// What could be had now without pushing anything out.
    pub available: Bytes,
    /// What this process holds (resident set).
    pub process: Bytes,
}

/// Where memory figures come from. Tests script it.
pub trait Probe: fmt::Debug + Send + Sync + 'static {
    /// The figures of this moment; `None` where the platform does not tell.
    fn read(&self) -> Option<SystemMemory>;
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
        };
        if let Some(limits) = system.cgroup_limits() {
            memory.total = memory.total.min(Bytes(limits.total_memory));
            // The group's own "free" counts the page cache as used, which the kernel gives up when asked.
            let unclaimed = limits.total_memory.saturating_sub(limits.rss);
            memory.available = memory.available.min(Bytes(unclaimed));
        }
        if let Ok(pid) = sysinfo::get_current_pid() {
            let what = ProcessRefreshKind::nothing().with_memory();
            system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, what);
            memory.process = system.process(pid).map_or(Bytes::ZERO, |process| Bytes(process.memory()));
        }
        Some(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_probe_sees_this_process_and_machine() {
        let memory = SystemProbe::new().read().unwrap();
        assert!(memory.process > Bytes(100_000), "{memory:?}");
        assert!(memory.total >= memory.available && memory.available > Bytes::ZERO, "{memory:?}");
    }
}

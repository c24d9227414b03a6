//! What this process and its pool hold, looked at every 10 ms.

use std::fs;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use sarai_core::units::Bytes;

use crate::Result;

const EVERY: Duration = Duration::from_millis(10);

/// A thread that watches.
#[derive(Debug)]
pub(crate) struct Watch {
    stop: SyncSender<()>,
    thread: JoinHandle<Watched>,
}

/// What it has seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Watched {
    pub(crate) samples: u64,
    /// The most that was resident.
    pub(crate) most: Bytes,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let (stop, stopped) = mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || {
            let mut watched = Watched::default();
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                if let Ok(resident) = resident() {
                    watched.samples += 1;
                    watched.most = watched.most.max(resident);
                }
            }
            watched
        });
        Self { stop, thread }
    }

    pub(crate) fn end(self) -> Result<Watched> {
        drop(self.stop);
        self.thread.join().map_err(|_| "the watching thread panicked".into())
    }
}

/// What is resident of this process.
pub(crate) fn resident() -> Result<Bytes> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(Bytes(kilobytes * 1024))
}

/// The time that this process has computed so far, all threads together.
pub(crate) fn computed() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

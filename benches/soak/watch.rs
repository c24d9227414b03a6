//! What this process and its pool hold, looked at every 10 ms.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use sarai_core::units::Bytes;

use crate::Result;

const EVERY: Duration = Duration::from_millis(10);

/// A thread that watches.
#[derive(Debug)]
pub(crate) struct Watch {
    seen: Arc<Seen>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Seen {
    stop: AtomicBool,
    samples: AtomicU64,
    most: AtomicU64,
}

/// What it has seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watched {
    pub(crate) samples: u64,
    /// The most that was resident.
    pub(crate) most: Bytes,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let seen = Arc::new(Seen::default());
        let watching = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            while !watching.stop.load(Ordering::Relaxed) {
                if let Ok(resident) = resident() {
                    watching.samples.fetch_add(1, Ordering::Relaxed);
                    watching.most.fetch_max(resident.0, Ordering::Relaxed);
                }
                std::thread::sleep(EVERY);
            }
        });
        Self { seen, thread }
    }

    pub(crate) fn end(self) -> Result<Watched> {
        self.seen.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the watching thread panicked")?;
        let read = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        Ok(Watched { samples: read(&self.seen.samples), most: Bytes(read(&self.seen.most)) })
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

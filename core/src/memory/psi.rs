//! The kernel's word that programs wait for memory: Linux's pressure stall information.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Of the machine, and of the own control group where it is mounted as its root.
const FILES: [&str; 2] = ["/sys/fs/cgroup/memory.pressure", "/proc/pressure/memory"];

/// Some program has waited for memory for 150 ms of the last 2 s. Without privileges the kernel takes only multiples of
/// 2 s (its `Documentation/accounting/psi.rst`).
const TRIGGER: &[u8] = b"some 150000 2000000\0";

/// How soon the thread sees that nobody listens any more.
const LOOK_UP: Duration = Duration::from_secs(10);

/// One item each time that programs have waited for memory, at most one in 2 s; none where the kernel does not tell.
pub(super) fn pressure() -> BoxStream<'static, ()> {
    let open = |file: &&str| match open(Path::new(file)) {
        Ok(trigger) => Some(trigger),
        Err(error) => {
            tracing::debug!(file, %error, "the kernel does not tell of memory pressure here");
            None
        }
    };
    let triggers: Vec<File> = FILES.iter().filter_map(open).collect();
    if triggers.is_empty() {
        return stream::pending().boxed();
    }
    // One that nobody has taken yet says it all.
    let (told, heard) = mpsc::channel(1);
    let watch = std::thread::Builder::new().name("sarai-pressure".to_owned());
    if let Err(error) = watch.spawn(move || watch_all(&triggers, &told)) {
        tracing::warn!(%error, "memory pressure is not watched");
    }
    ReceiverStream::new(heard).chain(stream::pending()).boxed()
}

fn open(file: &Path) -> io::Result<File> {
    let mut file = File::options().read(true).write(true).open(file)?;
    file.write_all(TRIGGER)?;
    Ok(file)
}

/// Until nobody listens any more.
fn watch_all(triggers: &[File], told: &mpsc::Sender<()>) {
    let timeout = Timespec { tv_sec: LOOK_UP.as_secs() as i64, tv_nsec: 0 };
    while !told.is_closed() {
        let mut polled: Vec<_> = triggers.iter().map(|file| PollFd::new(file, PollFlags::PRI)).collect();
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return tracing::warn!(%error, "memory pressure is not watched any more"),
        }
        if polled.iter().any(|one| one.revents().intersects(PollFlags::ERR | PollFlags::NVAL)) {
            return tracing::warn!("the kernel does not tell of memory pressure any more");
        }
        if let Err(mpsc::error::TrySendError::Closed(())) = told.try_send(()) {
            return;
        }
    }
}

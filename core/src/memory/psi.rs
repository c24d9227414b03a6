//! The kernel's word that programs wait for memory: Linux's pressure stall information.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::cgroup;

/// Of the own control group, which may be short of memory while the machine is not, and of the machine, on which other
/// programs may be.
fn files(root: &Path) -> Vec<PathBuf> {
    let own = cgroup::own_file(root, "memory.pressure");
    own.into_iter().chain([root.join("proc/pressure/memory")]).collect()
}

/// Some program has waited for memory for 150 ms of the last 2 s. Without privileges the kernel takes only multiples of
/// 2 s (its `Documentation/accounting/psi.rst`).
const TRIGGER: &[u8] = b"some 150000 2000000\0";

/// How soon the thread sees that nobody listens any more.
const LOOK_UP: Duration = Duration::from_secs(10);

/// One item each time that programs have waited for memory, at most one in 2 s; none where the kernel does not tell.
pub(super) fn pressure() -> BoxStream<'static, ()> {
    let open = |file: PathBuf| match open(&file) {
        Ok(trigger) => Some(trigger),
        Err(error) => {
            tracing::debug!(file = %file.display(), %error, "the kernel does not tell of memory pressure here");
            None
        }
    };
    let triggers: Vec<File> = files(Path::new("/")).into_iter().filter_map(open).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_control_group_is_watched_and_the_machine() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("sys/fs/cgroup/user.slice/app.scope");
        std::fs::create_dir_all(&group).unwrap();
        std::fs::create_dir_all(root.path().join("proc/self")).unwrap();
        let machine = root.path().join("proc/pressure/memory");
        assert_eq!(files(root.path()), std::slice::from_ref(&machine), "no group is known");
        std::fs::write(root.path().join("proc/self/cgroup"), "0::/user.slice/app.scope\n").unwrap();
        assert_eq!(files(root.path()), std::slice::from_ref(&machine), "the kernel has no such file");
        std::fs::write(group.join("memory.pressure"), "").unwrap();
        assert_eq!(files(root.path()), [group.join("memory.pressure"), machine]);
    }

    #[test]
    fn a_trigger_is_written_as_the_kernel_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("memory");
        assert!(open(&file).is_err(), "there is none");
        std::fs::write(&file, "").unwrap();
        open(&file).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"some 150000 2000000\0");
    }
}

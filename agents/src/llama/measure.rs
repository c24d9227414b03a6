//! What a loaded model really holds, as the kernel counts it. Linux only; elsewhere nothing is measured.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sarai_core::memory::Footprint;
use sarai_core::units::Bytes;

/// What is resident of this process: `RssFile` and `RssAnon`, its program and libraries included.
pub(super) fn process() -> Option<Footprint> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).and_then(kilobytes);
    Some(Footprint { file_backed: field("RssFile:")?, anonymous: Some(field("RssAnon:")?), exact: true })
}

/// What steps add to the process's own memory: their buffers are reserved at load, and touched by the first step that is
/// as large as them.
#[derive(Clone, Debug, Default)]
pub(super) struct Growth {
    /// The largest step that came to its end.
    largest: usize,
    grown: Arc<Grown>,
}

#[derive(Debug, Default)]
struct Grown {
    bytes: AtomicU64,
    /// Whether a step has added what nobody knows.
    missed: AtomicBool,
}

impl Growth {
    /// The buffers are gone with their context.
    pub(super) fn forget(&self) {
        self.grown.bytes.store(0, Ordering::Relaxed);
        self.grown.missed.store(false, Ordering::Relaxed);
    }

    /// What was added so far, as far as it is known.
    pub(super) fn bytes(&self) -> Bytes {
        Bytes(self.grown.bytes.load(Ordering::Relaxed))
    }

    /// Whether all that was added is known.
    pub(super) fn is_exact(&self) -> bool {
        !self.grown.missed.load(Ordering::Relaxed)
    }

    /// The largest step that came to its end, in tokens.
    pub(super) fn largest(&self) -> usize {
        self.largest
    }

    /// Whether a step of so many tokens touches what none before it has.
    pub(super) fn grows(&self, tokens: usize) -> bool {
        tokens > self.largest
    }

    /// After a step that grows, with what it added, where nothing else made the process grow meanwhile. One that was stopped
    /// may have touched a part of its buffers only: the next one grows, too.
    pub(super) fn after(&mut self, tokens: usize, added: Option<Bytes>, ended: bool) {
        match added {
            Some(added) => {
                self.grown.bytes.fetch_add(added.0, Ordering::Relaxed);
            }
            None => self.grown.missed.store(true, Ordering::Relaxed),
        }
        if ended {
            self.largest = tokens;
        }
    }
}

/// By how much the process's own memory has grown since then.
pub(super) fn grown(since: Option<Footprint>) -> Option<Bytes> {
    Some(process()?.anonymous?.saturating_sub(since?.anonymous?))
}

/// Resident pages of this process's maps of a file, which several maps of it share: no more than the file has.
pub(super) fn mapped(file: &Path) -> Option<Bytes> {
    let file = std::fs::canonicalize(file).ok()?;
    let size = std::fs::metadata(&file).ok()?.len();
    let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    let mut total = Bytes::ZERO;
    let mut inside = false;
    for line in maps.lines() {
        if let Some(rest) = line.strip_prefix("Rss:") {
            total += if inside { kilobytes(rest)? } else { Bytes::ZERO };
        } else if is_map(line) {
            // address, permissions, offset, device, inode, then the path, which may hold spaces.
            let path = line.splitn(6, ' ').nth(5).unwrap_or("").trim_start();
            inside = Path::new(path) == file;
        }
    }
    // The last page of a map may be more than the file has left.
    Some(total.min(Bytes(size.next_multiple_of(4096))))
}

/// Blocks of this size and more come from the system and go back to it when they are freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const OWN_BLOCK: std::ffi::c_int = 4 << 20;

/// Has the C library give large blocks back as soon as they are freed. Left to itself, it raises its threshold to 32 MB once
/// one of that size was freed, and then keeps up to 64 MB at the end of each thread's heap, which no trimming reaches.
pub(super) fn give_large_blocks_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "the C library's own function has no safe wrapper")]
        // SAFETY: mallopt takes numbers and may be called at any time from any thread.
        let set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_BLOCK) };
        if set == 0 {
            tracing::debug!("the C library keeps its own threshold for large blocks");
        }
    }
}

/// Gives memory that was freed back to the system, where the C library keeps it otherwise.
pub(super) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "the C library's own function has no safe wrapper")]
        // SAFETY: malloc_trim takes no pointer and may be called at any time from any thread.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// A map's first line starts with its address range; the lines below it with a word and a colon.
fn is_map(line: &str) -> bool {
    line.split(' ').next().is_some_and(|first| first.contains('-') && !first.ends_with(':'))
}

fn kilobytes(text: &str) -> Option<Bytes> {
    let number = text.trim().strip_suffix("kB")?.trim();
    number.parse::<u64>().ok().map(|n| Bytes(n * 1024))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn anonymous_memory_grows_by_what_is_written() {
        let anonymous = || process().unwrap().anonymous.unwrap();
        let before = anonymous();
        let block = vec![1_u8; 64 << 20];
        let after = anonymous();
        assert_eq!(block.iter().map(|&n| u64::from(n)).sum::<u64>(), 64 << 20);
        assert!(after.0 - before.0 >= 60 << 20, "{before} {after}");
    }

    #[test]
    fn a_step_that_was_stopped_or_ran_beside_others_does_not_pass_for_measured() {
        let mut growth = Growth::default();
        growth.after(512, Some(Bytes(30)), false);
        assert!(growth.grows(512) && growth.is_exact() && growth.bytes() == Bytes(30));
        growth.after(512, Some(Bytes(70)), true);
        assert!(!growth.grows(512) && growth.is_exact() && growth.bytes() == Bytes(100));
        // Nobody knows what the largest one has touched; the next adds nothing, and makes nothing good.
        growth.after(1024, None, true);
        growth.after(1025, Some(Bytes::ZERO), true);
        assert!(!growth.is_exact() && growth.largest() == 1025);
        growth.forget();
        assert!(growth.is_exact() && growth.bytes() == Bytes::ZERO);
    }

    #[test]
    fn the_running_program_is_mapped_and_another_file_is_not() {
        let program = std::env::current_exe().unwrap();
        assert!(mapped(&program).unwrap() > Bytes(100_000));
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other");
        std::fs::write(&other, "x").unwrap();
        assert_eq!(mapped(&other), Some(Bytes::ZERO));
    }
}

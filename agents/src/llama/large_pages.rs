//! Large pages for repacked weights. An answer's every token takes all weights through the CPU, which has to look up where each
//! page of memory is: with pages of 2 MiB that is a lookup for 512 of the usual ones. Linux gives them to those who ask, before
//! the memory is written to; a map of a file cannot have them.

#![cfg_attr(
    target_os = "linux",
    expect(unsafe_code, reason = "advice on memory that llama.cpp has reserved")
)]

/// Smaller blocks than this are no weights.
#[cfg(target_os = "linux")]
const LEAST: usize = 16 << 20;

/// Where this process had memory of its own at some time.
#[derive(Debug)]
pub(super) struct Before {
    #[cfg(target_os = "linux")]
    ranges: Vec<std::ops::Range<usize>>,
}

impl Before {
    pub(super) fn now() -> Self {
        Self {
            #[cfg(target_os = "linux")]
            ranges: own_memory(),
        }
    }

    /// Asks for large pages for the large blocks that were reserved since. Where the system has none, the usual ones do.
    pub(super) fn ask_for_what_is_new(&self) {
        #[cfg(target_os = "linux")]
        for new in since(&self.ranges, &own_memory()) {
            let start = std::ptr::with_exposed_provenance_mut(new.start);
            // SAFETY: advice on how the kernel backs addresses changes nothing of what is there, whoever owns it; were they
            // given back meanwhile, the kernel would refuse or advise whatever is there now.
            let asked = unsafe { rustix::mm::madvise(start, new.len(), rustix::mm::Advice::LinuxHugepage) };
            match asked {
                Ok(()) => tracing::debug!(bytes = new.len(), "large pages were asked for"),
                Err(error) => tracing::debug!(%error, "there are no large pages"),
            }
        }
    }
}

/// The address ranges of this process that no file is mapped to, in order.
#[cfg(target_os = "linux")]
fn own_memory() -> Vec<std::ops::Range<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let range = |line: &str| {
        // address, permissions, offset, device, inode, then a path where there is one.
        let mut fields = line.split_ascii_whitespace();
        let (from, to) = fields.next()?.split_once('-')?;
        let writable = fields.next()?.starts_with("rw-p");
        let own = fields.nth(2)? == "0" && fields.next().is_none();
        let address = |text| usize::from_str_radix(text, 16).ok();
        (writable && own).then_some(address(from)?..address(to)?)
    };
    maps.lines().filter_map(range).collect()
}

/// What of `now` is large and not in `before`; both are in order. Neighbours of old blocks are one range with them by now.
#[cfg(target_os = "linux")]
fn since(before: &[std::ops::Range<usize>], now: &[std::ops::Range<usize>]) -> Vec<std::ops::Range<usize>> {
    let mut new = Vec::new();
    for range in now {
        let mut from = range.start;
        for old in before.iter().filter(|old| old.start < range.end && old.end > range.start) {
            new.push(from..old.start.max(from));
            from = old.end.max(from);
        }
        new.push(from..range.end.max(from));
    }
    new.retain(|range| range.len() >= LEAST);
    new
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_found_beside_and_between_what_was_there() {
        const M: usize = 1 << 20;
        let old = [100 * M..200 * M, 300 * M..310 * M];
        let found = |from: usize, to: usize| since(&old, std::slice::from_ref(&(from * M..to * M)));
        assert_eq!(since(&old, &old), []);
        assert_eq!(since(&old, &[0..40 * M, old[0].clone()]), vec![0..40 * M]);
        assert_eq!(found(80, 240), [80 * M..100 * M, 200 * M..240 * M]);
        assert_eq!(found(150, 400), [200 * M..300 * M, 310 * M..400 * M]);
        assert_eq!(found(200, 210), [], "too small");
        assert_eq!(found(120, 130), [], "what is left of an old one");
    }

    #[test]
    fn a_new_block_gets_large_pages_where_the_kernel_has_them() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return;
        }
        let before = Before::now();
        let block = vec![0_u8; 64 << 20];
        before.ask_for_what_is_new();
        let middle = block.as_ptr().addr() + block.len() / 2;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        let mut flags = None;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|first| first.split_once('-'));
            let ends = range.and_then(|(from, to)| {
                Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
            });
            if let Some((from, to)) = ends {
                inside = (from..to).contains(&middle);
            } else if inside && line.starts_with("VmFlags:") {
                flags = Some(line.to_owned());
            }
        }
        let flags = flags.expect("the block is mapped");
        assert!(flags.split(' ').any(|flag| flag == "hg"), "{flags}");
    }
}

//! What the control groups that this process is in leave it of memory. Linux's versions 2 and 1, nested groups included:
//! every one on the way to the root has a limit of its own.

use std::fs;
use std::path::{Path, PathBuf};

use crate::units::Bytes;

/// The tightest of the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Its limit.
    pub(super) limit: Bytes,
    /// What is left of it, were its page cache given up.
    pub(super) available: Bytes,
}

/// A version's names.
struct Version {
    /// Where the hierarchy is mounted.
    mount: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// Keys of `memory.stat` that count pages of files which nobody has written to, or whose writes can be waited for.
    cache: [&'static str; 2],
}

const TWO: Version = Version {
    mount: "sys/fs/cgroup",
    limit: "memory.max",
    usage: "memory.current",
    cache: ["inactive_file", "active_file"],
};
/// Version 2 beside version 1, as systemd's hybrid mode mounts it.
const TWO_BESIDE: Version = Version { mount: "sys/fs/cgroup/unified", ..TWO };
const ONE: Version = Version {
    mount: "sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};

/// The group that leaves this process least, with `root` for `/`. `None` where no group has a limit.
pub(super) fn tightest(root: &Path) -> Option<Group> {
    let of_process = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let groups = memberships(&of_process).flat_map(|(version, path)| version.groups(root, path));
    groups.reduce(|a, b| Group { limit: a.limit.min(b.limit), available: a.available.min(b.available) })
}

/// A file of the group of version 2 that this process is in, with `root` for `/`. `None` where it has none.
pub(super) fn own_file(root: &Path, name: &str) -> Option<PathBuf> {
    let of_process = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let version_2 = memberships(&of_process).filter(|(version, _)| version.limit == TWO.limit);
    let mut files = version_2.map(|(version, path)| version.own(root, path).join(name));
    files.find(|file| file.is_file())
}

/// The places where a process's groups may be, by the text of `/proc/self/cgroup`.
fn memberships(of_process: &str) -> impl Iterator<Item = (&'static Version, &str)> {
    let groups = of_process.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (hierarchy, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        if hierarchy == "0" && controllers.is_empty() {
            return Some(vec![(&TWO, path), (&TWO_BESIDE, path)]);
        }
        controllers.split(',').any(|controller| controller == "memory").then(|| vec![(&ONE, path)])
    });
    groups.flatten()
}

impl Version {
    fn own(&self, root: &Path, path: &str) -> PathBuf {
        let mount = root.join(self.mount);
        let own = mount.join(path.trim_start_matches('/'));
        // Inside a container the path may be the host's, and the mount the container's own group.
        if own.is_dir() { own } else { mount }
    }

    /// The group at `path` and all above it that have a limit.
    fn groups(&'static self, root: &Path, path: &str) -> Vec<Group> {
        let (mount, own) = (root.join(self.mount), self.own(root, path));
        let above = own.ancestors().take_while(|folder| folder.starts_with(&mount)).map(PathBuf::from);
        above.filter_map(|folder| self.read(&folder)).collect()
    }

    fn read(&self, folder: &Path) -> Option<Group> {
        let text = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let number = |name: &str| text(name)?.trim().parse::<u64>().ok();
        // Version 2 says `max` for no limit, version 1 a number beyond any machine.
        let limit = number(self.limit).filter(|limit| *limit < i64::MAX as u64 / 2)?;
        let usage = number(self.usage)?;
        let stat = text("memory.stat").unwrap_or_default();
        let cache: u64 = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(key, _)| self.cache.contains(key))
            .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
            .sum();
        let used = usage.saturating_sub(cache);
        Some(Group { limit: Bytes(limit), available: Bytes(limit.saturating_sub(used)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine's root with these files.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = root.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        root
    }

    fn group(limit: u64, available: u64) -> Option<Group> {
        Some(Group { limit: Bytes(limit), available: Bytes(available) })
    }

    #[test]
    fn the_tightest_of_nested_groups_counts_and_page_cache_is_free() {
        let root = machine(&[
            ("proc/self/cgroup", "0::/user/agent\n"),
            ("sys/fs/cgroup/user/memory.max", "4000\n"),
            ("sys/fs/cgroup/user/memory.current", "3500\n"),
            ("sys/fs/cgroup/user/memory.stat", "anon 1000\ninactive_file 300\nactive_file 200\n"),
            ("sys/fs/cgroup/user/agent/memory.max", "3000\n"),
            ("sys/fs/cgroup/user/agent/memory.current", "700\n"),
            ("sys/fs/cgroup/user/agent/memory.stat", "inactive_file 600\nactive_file 50\n"),
        ]);
        assert_eq!(tightest(root.path()), group(3000, 1000), "the parent's room, the child's limit");
    }

    #[test]
    fn a_group_without_a_limit_is_none() {
        let root = machine(&[
            ("proc/self/cgroup", "0::/agent\n"),
            ("sys/fs/cgroup/agent/memory.max", "max\n"),
            ("sys/fs/cgroup/agent/memory.current", "700\n"),
        ]);
        assert_eq!(tightest(root.path()), None);
        assert_eq!(tightest(machine(&[]).path()), None);
    }

    #[test]
    fn version_1_is_read_and_its_number_for_no_limit_known() {
        let limits = |limit| {
            machine(&[
                ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n"),
                ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", limit),
                ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "900\n"),
                (
                    "sys/fs/cgroup/memory/a/memory.stat",
                    "cache 9\ntotal_inactive_file 100\ntotal_active_file 1\n",
                ),
            ])
        };
        assert_eq!(tightest(limits("2000\n").path()), group(2000, 1201));
        assert_eq!(tightest(limits("9223372036854771712\n").path()), None);
    }

    #[test]
    fn a_file_of_the_own_group_is_found_wherever_version_2_is_mounted() {
        let own = |of_process, file| {
            let root = machine(&[("proc/self/cgroup", of_process), (file, "some")]);
            let found = own_file(root.path(), "memory.pressure");
            found.map(|found| found.strip_prefix(root.path()).unwrap().display().to_string())
        };
        let nested = "sys/fs/cgroup/user.slice/app.scope/memory.pressure";
        assert_eq!(own("0::/user.slice/app.scope\n", nested).as_deref(), Some(nested));
        assert_eq!(own("0::/user.slice\n", nested), None, "its child's is not its own");
        let beside = "sys/fs/cgroup/unified/a/memory.pressure";
        assert_eq!(own("4:memory:/b\n0::/a\n", beside).as_deref(), Some(beside));
        let container = "sys/fs/cgroup/memory.pressure";
        assert_eq!(own("0::/docker/0123\n", container).as_deref(), Some(container));
        assert_eq!(own("0::/\n", container).as_deref(), Some(container));
        assert_eq!(own("4:memory:/\n", "sys/fs/cgroup/memory/memory.pressure"), None, "version 1 has none");
        assert_eq!(own("nonsense", container), None);
    }

    #[test]
    fn in_a_container_the_mount_is_the_group() {
        let root = machine(&[
            ("proc/self/cgroup", "0::/docker/0123456789ab\n"),
            ("sys/fs/cgroup/memory.max", "2000"),
            ("sys/fs/cgroup/memory.current", "2500"),
        ]);
        assert_eq!(tightest(root.path()), group(2000, 0));
    }
}

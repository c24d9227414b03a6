//! The other side: llama.cpp's own programs, as processes.

mod llama_bench;
mod llama_server;

use std::path::{Path, PathBuf};

pub(crate) use llama_bench::Speeds;

/// Where `build_peer` has put llama-bench and llama-server.
#[derive(Debug)]
pub(crate) struct Peer {
    folder: PathBuf,
}

impl Peer {
    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Which llama.cpp its programs were built from.
    pub(crate) fn version(&self) -> String {
        // The distribution's own description, as `build_peer` unpacks it.
        let about = std::fs::read_to_string(self.folder.join("src/PKG-INFO")).unwrap_or_default();
        let version = about.lines().find_map(|line| line.strip_prefix("Version: "));
        format!("the llama.cpp of llama-cpp-python {}", version.unwrap_or("of an unknown version").trim())
    }

    fn program(&self, name: &str) -> crate::Result<PathBuf> {
        let path = self.folder.join("bin").join(name);
        if path.is_file() {
            return Ok(path);
        }
        Err(format!(
            "{} is not there; make it: benches/compare/build_peer {}",
            path.display(),
            self.folder.display()
        )
        .into())
    }
}

/// How the weights are held, on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// As each side does it by itself: llama.cpp maps the file and repacks what it can.
    Default,
    /// The plain map of the file, nothing repacked.
    Mmap,
    /// No map, repacked.
    Repack,
}

impl Weights {
    /// The configuration's word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Default => "auto",
            Self::Mmap => "mmap",
            Self::Repack => "repack",
        }
    }

    /// What llama-bench has to be told.
    pub(crate) fn bench_flags(self) -> &'static [&'static str] {
        match self {
            Self::Default => &[],
            Self::Mmap => &["--load-mode", "mmap", "--repack", "0"],
            Self::Repack => &["--load-mode", "none", "--repack", "1"],
        }
    }

    /// What llama-server has to be told.
    pub(crate) fn server_flags(self) -> &'static [&'static str] {
        match self {
            Self::Default => &[],
            Self::Mmap => &["--load-mode", "mmap", "--no-repack"],
            Self::Repack => &["--load-mode", "none", "--repack"],
        }
    }
}

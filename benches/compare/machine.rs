//! What the figures were measured on.

use std::fmt;
use std::fs;

use serde::Serialize;

/// The machine, as far as Linux tells.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    ram_gb: f64,
    kernel: String,
}

impl Machine {
    pub(crate) fn read() -> Self {
        let cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown CPU".to_owned());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease");
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            ram_gb: ram_gb(),
            kernel: kernel.map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned()),
        }
    }
}

/// The machine's memory in GB (10⁹ bytes), 0 where it is unknown.
pub(crate) fn ram_gb() -> f64 {
    let kib = field("/proc/meminfo", "MemTotal").and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    kib.map_or(0.0, |kib| kib * 1024.0 / 1e9)
}

/// The value of the first line `key : value`.
fn field(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.into_iter().find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cores, ram_gb, kernel } = self;
        write!(f, "{cpu}, {cores} cores, {ram_gb:.1} GB RAM, kernel {kernel}")
    }
}

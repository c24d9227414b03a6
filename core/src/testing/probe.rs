use std::sync::{Mutex, PoisonError};

use crate::memory::{Probe, SystemMemory};
use crate::units::Bytes;

/// A machine with as much memory as the test says.
#[derive(Debug)]
pub struct FakeProbe {
    memory: Mutex<SystemMemory>,
}

impl FakeProbe {
    /// A machine with `total` bytes, all of them free.
    #[must_use]
    pub fn new(total: Bytes) -> Self {
        Self { memory: Mutex::new(SystemMemory { total, available: total, ..SystemMemory::default() }) }
    }

    /// From now on so much is free.
    pub fn set_available(&self, available: Bytes) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).available = available;
    }
}

impl Probe for FakeProbe {
    fn read(&self) -> Option<SystemMemory> {
        Some(*self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

use std::sync::{Mutex, PoisonError};

use futures::stream::{self, BoxStream, StreamExt};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;

use crate::memory::{Probe, SystemMemory};
use crate::units::Bytes;

/// A machine with as much memory as the test says.
#[derive(Debug)]
pub struct FakeProbe {
    memory: Mutex<SystemMemory>,
    pressure: broadcast::Sender<()>,
}

impl FakeProbe {
    /// A machine with `total` bytes, all of them free.
    #[must_use]
    pub fn new(total: Bytes) -> Self {
        let memory = Mutex::new(SystemMemory { total, available: total, ..SystemMemory::default() });
        Self { memory, pressure: broadcast::channel(16).0 }
    }

    /// The system says that programs wait for memory.
    pub fn press(&self) {
        // Nobody listens yet: then nobody has to be told.
        let _nobody = self.pressure.send(());
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

    fn pressure(&self) -> BoxStream<'static, ()> {
        BroadcastStream::new(self.pressure.subscribe()).map(|_| ()).chain(stream::pending()).boxed()
    }
}

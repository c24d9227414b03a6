use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::units::Bytes;

/// Which weights a load needs: equal for two models that can share them, because they are on the same file and hold it
/// in the same way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WeightsId(Arc<str>);

impl WeightsId {
    /// An id; what it says is the backend's business.
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }
}

/// What a load is expected to take of this process's memory, by kind. Computed from a file's header and the load
/// settings, never measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// The model's tensors.
    pub weights: Bytes,
    /// Keys and values (or recurrent state) of the whole context.
    pub kv: Bytes,
    /// Buffers of the computation and of its outputs.
    pub compute: Bytes,
    /// The vision or audio projector.
    pub projector: Bytes,
    /// Vocabulary, metadata and the allocator's own.
    pub overhead: Bytes,
    /// What the load takes besides, and has given back when it ends.
    pub passing: Bytes,
    /// The context length that the load will make, in tokens; `None` for models on hosts.
    pub n_ctx: Option<u32>,
    /// What the same load took the last time, all its buffers in use; `None` where that was not measured.
    pub measured_before: Option<Bytes>,
    /// How long the same load took the last time.
    pub load_time: Option<Duration>,
    /// Which weights these are, where other models may share them: then they count once.
    pub weights_id: Option<WeightsId>,
}

impl Estimate {
    /// All kinds together.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.weights + self.kv + self.compute + self.projector + self.overhead
    }

    /// What the pool reserves for a loaded model, as long as nobody shares the weights: what was measured before, else the
    /// total.
    #[must_use]
    pub fn reserve(&self) -> Bytes {
        self.measured_before.unwrap_or_else(|| self.total())
    }

    /// What it reserves while the model is loaded.
    #[must_use]
    pub fn at_load(&self) -> Bytes {
        self.reserve() + self.passing
    }
}

/// What a loaded model really holds of this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Resident pages of mapped model files. The kernel can take them back and read them again.
    pub file_backed: Bytes,
    /// Memory that only this process holds. `None` where it could not be told apart from what others took meanwhile.
    pub anonymous: Option<Bytes>,
}

impl Footprint {
    /// Nothing, as a model on a host holds here.
    pub const NONE: Self = Self { file_backed: Bytes::ZERO, anonymous: Some(Bytes::ZERO) };

    /// Both together, where both are known.
    #[must_use]
    pub fn total(&self) -> Option<Bytes> {
        Some(self.file_backed + self.anonymous?)
    }
}

use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

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
    /// What is reserved besides `measured_before`: no load takes just what the one before it took, and the process keeps
    /// something of each.
    pub spare: Bytes,
    /// How long the same load took the last time.
    pub load_time: Option<Duration>,
    /// The same load with shorter contexts, longest first, where the length may be chosen: what can be made of the model
    /// when memory is short. These have none themselves.
    pub shorter: Vec<Estimate>,
    /// Which weights these are, where other models may share them: then they count once.
    pub weights_id: Option<WeightsId>,
}

impl Estimate {
    /// All kinds together.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.weights + self.kv + self.compute + self.projector + self.overhead
    }

    /// What the pool reserves for a loaded model, as long as nobody shares the weights: what was measured before, and a
    /// little more; else the total.
    #[must_use]
    pub fn reserve(&self) -> Bytes {
        self.measured_before.map_or_else(|| self.total(), |measured| measured + self.spare)
    }

    /// What is free once a model that was loaded like this has become like `other`, which differs in its context alone. By
    /// the figures of the estimates, which err in the same way for both.
    #[must_use]
    pub fn saves(&self, other: &Self) -> Bytes {
        self.total().saturating_sub(other.total())
    }

    /// What it reserves while the model is loaded.
    #[must_use]
    pub fn at_load(&self) -> Bytes {
        self.reserve() + self.passing
    }
}

/// By kind, with the total.
impl Serialize for Estimate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct ByKind {
            weights: Bytes,
            kv: Bytes,
            compute: Bytes,
            projector: Bytes,
            overhead: Bytes,
            total: Bytes,
            passing: Bytes,
            measured_before: Option<Bytes>,
            load_seconds: Option<f64>,
            n_ctx: Option<u32>,
        }
        let by_kind = ByKind {
            weights: self.weights,
            kv: self.kv,
            compute: self.compute,
            projector: self.projector,
            overhead: self.overhead,
            total: self.total(),
            passing: self.passing,
            measured_before: self.measured_before,
            load_seconds: self.load_time.map(|time| time.as_secs_f64()),
            n_ctx: self.n_ctx,
        };
        by_kind.serialize(serializer)
    }
}

/// What an unload gave back, where nothing else changed the process's memory meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// What the model held, as measured before.
    pub held: Bytes,
    /// By how much the process became smaller.
    pub returned: Bytes,
}

impl Freed {
    /// A twentieth of what was held, and this much in any case, may stay behind: allocators keep some pages.
    const MAY_STAY: Bytes = Bytes(16_000_000);

    /// What did not come back, where that is more than may stay behind.
    #[must_use]
    pub fn shortfall(&self) -> Option<Bytes> {
        let missing = self.held.saturating_sub(self.returned);
        (missing > Self::MAY_STAY.max(Bytes(self.held.0 / 20))).then_some(missing)
    }
}

/// What a loaded model really holds of this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Resident pages of mapped model files. The kernel can take them back and read them again.
    pub file_backed: Bytes,
    /// Memory that only this process holds. `None` where it could not be told apart from what others took meanwhile.
    pub anonymous: Option<Bytes>,
    /// Whether all of `anonymous` was measured as this model's. Else it is the model's part, by the estimates, of what several
    /// took together, or lacks what a step added while something else made the process grow, too.
    pub exact: bool,
}

impl Footprint {
    /// Nothing, as a model on a host holds here.
    pub const NONE: Self = Self { file_backed: Bytes::ZERO, anonymous: Some(Bytes::ZERO), exact: true };

    /// Both together, where both are known.
    #[must_use]
    pub fn total(&self) -> Option<Bytes> {
        Some(self.file_backed + self.anonymous?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortfall_is_more_than_a_twentieth_and_more_than_allocators_keep() {
        let short = |held, returned| {
            let returned = Freed { held: Bytes(held), returned: Bytes(returned) };
            returned.shortfall().map(|bytes| bytes.0)
        };
        assert_eq!(short(1_000_000_000, 940_000_000), Some(60_000_000));
        assert_eq!(short(1_000_000_000, 951_000_000), None);
        assert_eq!(short(30_000_000, 15_000_000), None, "half, but little");
        assert_eq!(short(1_000_000_000, 2_000_000_000), None);
    }

    #[test]
    fn what_was_measured_before_is_reserved_and_the_kinds_stay_what_they_are() {
        let estimate =
            Estimate { weights: Bytes(10), kv: Bytes(5), passing: Bytes(3), ..Estimate::default() };
        assert_eq!(
            (estimate.total(), estimate.reserve(), estimate.at_load()),
            (Bytes(15), Bytes(15), Bytes(18))
        );
        let measured = Estimate { measured_before: Some(Bytes(12)), spare: Bytes(1), ..estimate };
        assert_eq!(
            (measured.total(), measured.reserve(), measured.at_load()),
            (Bytes(15), Bytes(13), Bytes(16))
        );
    }
}

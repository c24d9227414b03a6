use std::time::Duration;

use futures::{FutureExt, StreamExt};
use sarai::core::memory::{Probe, SystemProbe};
use sarai::core::scheduler::Phase;
use sarai::{Bytes, ModelPool, PoolEvent, PoolEvents};

/// How often is looked.
const LOOKS: Duration = Duration::from_millis(20);

/// Looks at what the process holds and at who is unloaded, while models are loaded and work.
///
/// It looks at the process as a whole, which is quick. For what each model holds, the kernel walks the page tables of all that
/// is loaded, and what is to be measured should have the CPU for itself.
#[derive(Debug)]
pub(super) struct Watch {
    probe: SystemProbe,
    before: Bytes,
    most: Bytes,
    events: PoolEvents,
    unloaded: Vec<String>,
}

impl Watch {
    /// Begins to watch, before anything is loaded.
    pub(super) fn begin(pool: &ModelPool) -> Self {
        let probe = SystemProbe::new();
        let before = held(&probe);
        Self { probe, before, most: Bytes::ZERO, events: pool.events(), unloaded: Vec::new() }
    }

    /// Does the work and looks meanwhile.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        let mut looks = tokio::time::interval(LOOKS);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                _ = looks.tick() => self.look(),
            }
        }
    }

    /// The most by which the process has grown.
    pub(super) fn most(&self) -> Bytes {
        self.most
    }

    /// Those who had to leave so far are of no interest.
    pub(super) fn forget_unloaded(&mut self) {
        self.look();
        self.unloaded.clear();
    }

    /// The models that had to leave, each with why.
    pub(super) fn unloaded(&mut self) -> &[String] {
        self.look();
        &self.unloaded
    }

    fn look(&mut self) {
        self.most = self.most.max(held(&self.probe).saturating_sub(self.before));
        while let Some(Some(event)) = self.events.next().now_or_never() {
            match event {
                PoolEvent::Slot(change) if change.to == Phase::Unloading => {
                    self.unloaded.push(format!("{} ({})", change.model, change.cause.as_str()));
                }
                // One of them may have told of it.
                PoolEvent::Missed(events) => self.unloaded.push(format!("{events} events that were missed")),
                _ => {}
            }
        }
    }
}

/// What is resident of this process; nothing where the system does not tell.
fn held(probe: &SystemProbe) -> Bytes {
    probe.read().map_or(Bytes::ZERO, |memory| memory.process)
}

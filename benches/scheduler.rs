//! What the scheduler costs a request: its decisions alone, without tokio or a model.
//!
//! `cargo bench --bench scheduler`

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on should panic")]

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use sarai_core::answer::Priority;
use sarai_core::config::Class;
use sarai_core::memory::Estimate;
use sarai_core::request::{Capabilities, Capability};
use sarai_core::scheduler::{Ask, Effect, Event, Eviction, Limits, RequestId, Scheduler, SlotId, SlotSpec};
use sarai_core::units::{Bytes, Timestamp};

const MODEL: Bytes = Bytes(1_000_000_000);

/// A scheduler with so many models, and someone who carries its effects out at once.
struct World {
    scheduler: Scheduler,
    now: Timestamp,
    next: u64,
    granted: Vec<RequestId>,
}

impl World {
    fn new(models: usize, fit: u64) -> Self {
        let slots = (0..models).map(|number| SlotSpec {
            model: format!("model-{number}").parse().unwrap(),
            llm: true,
            class: Class::OnDemand,
            capabilities: Capabilities::of(&[Capability::Generate]),
            parallel: 1,
            ttl: None,
        });
        let limits = Limits {
            budget: Bytes(MODEL.0 * fit),
            spare: Bytes::ZERO,
            reserve: Bytes::ZERO,
            eviction: Eviction::CostAware,
            max_concurrent_llms: models,
            max_waiting: 1024,
            aging: Duration::from_secs(30),
            drain_after: Duration::from_secs(10),
        };
        let scheduler = Scheduler::new(limits, slots.collect());
        Self { scheduler, now: Timestamp::default(), next: 0, granted: Vec::new() }
    }

    fn handle(&mut self, event: Event) {
        self.now = self.now + Duration::from_millis(1);
        self.scheduler.handle(event, self.now);
        while let Some(effect) = self.scheduler.poll_effect() {
            let event = match effect {
                Effect::Estimate { slot, left, .. } => Event::Estimated {
                    slot,
                    left,
                    short: false,
                    result: Ok(Estimate { weights: MODEL, ..Estimate::default() }),
                },
                Effect::StartLoad { slot, .. } => Event::Loaded { slot, result: Ok(None) },
                Effect::StartUnload { slot } => Event::Unloaded { slot },
                Effect::Grant { id, .. } => {
                    self.granted.push(id);
                    continue;
                }
                Effect::Reject { error, .. } => panic!("rejected: {error}"),
                _ => continue,
            };
            self.scheduler.handle(event, self.now);
        }
    }

    fn request(&mut self, slot: usize) -> RequestId {
        self.next += 1;
        let id = RequestId(self.next);
        let deadline = self.now + Duration::from_secs(3600);
        let ask = Ask { capability: Capability::Generate, priority: Priority::Normal, deadline, spare: None };
        self.handle(Event::Request { id, slot: SlotId(slot), ask });
        id
    }

    fn give_back(&mut self) {
        for id in std::mem::take(&mut self.granted) {
            self.handle(Event::Return { id });
        }
    }
}

fn scheduler(criterion: &mut Criterion) {
    criterion.bench_function("request and return, model ready", |bencher| {
        let mut world = World::new(8, 8);
        bencher.iter(|| {
            world.request(0);
            world.give_back();
        });
    });
    criterion.bench_function("request and return, 256 others waiting", |bencher| {
        let mut world = World::new(8, 8);
        // Never given back: whoever asks for this model waits.
        world.request(1);
        world.granted.clear();
        for _ in 0..256 {
            world.request(1);
        }
        bencher.iter(|| {
            world.request(0);
            world.give_back();
        });
    });
    criterion.bench_function("request that evicts one of 8 models", |bencher| {
        let mut world = World::new(16, 8);
        let mut slot = 0;
        bencher.iter(|| {
            world.request(slot % 16);
            world.give_back();
            slot += 1;
        });
    });
}

criterion_group!(benches, scheduler);
criterion_main!(benches);

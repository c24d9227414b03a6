//! Models that share their weights.

use std::time::Duration;

use sarai_core::answer::Priority;
use sarai_core::config::Class;
use sarai_core::memory::{Estimate, WeightsId};
use sarai_core::request::{Capabilities, Capability};
use sarai_core::scheduler::{Ask, Effect, Event, Eviction, Limits, RequestId, Scheduler, SlotId, SlotSpec};
use sarai_core::units::{Bytes, Timestamp};

/// Two models on one file: the second one fits beside the first because their weights count once.
#[test]
fn models_that_share_their_weights_fit_where_two_files_would_not() {
    let size = |own| Estimate {
        weights: Bytes(60),
        kv: Bytes(own),
        weights_id: Some(WeightsId::new("file")),
        ..Estimate::default()
    };
    let slot = |name: &str| SlotSpec {
        model: name.parse().unwrap(),
        llm: true,
        class: Class::OnDemand,
        capabilities: Capabilities::of(&[Capability::Generate]),
        parallel: 1,
        ttl: None,
    };
    let limits = Limits { budget: Bytes(100), eviction: Eviction::Lru, ..Limits::default() };
    let mut scheduler = Scheduler::new(limits, ["short", "long", "other"].map(slot).to_vec());
    let now = Timestamp::default();
    let ask = |scheduler: &mut Scheduler, id: u64, slot: usize, estimate: Estimate| {
        let wanted = Ask {
            capability: Capability::Generate,
            priority: Priority::Normal,
            deadline: now + Duration::from_secs(60),
            spare: None,
        };
        scheduler.handle(Event::Request { id: RequestId(id), slot: SlotId(slot), ask: wanted }, now);
        let mut evicted = Vec::new();
        while let Some(effect) = scheduler.poll_effect() {
            match effect {
                Effect::Estimate { slot, left, .. } => {
                    scheduler.handle(
                        Event::Estimated { slot, left, short: false, result: Ok(estimate.clone()) },
                        now,
                    );
                }
                Effect::StartLoad { slot, .. } => {
                    scheduler.handle(Event::Loaded { slot, result: Ok(None) }, now)
                }
                Effect::StartUnload { slot } => {
                    evicted.push(slot.0);
                    scheduler.handle(Event::Unloaded { slot }, now);
                }
                _ => {}
            }
        }
        scheduler.handle(Event::Return { id: RequestId(id) }, now);
        while scheduler.poll_effect().is_some() {}
        evicted
    };
    assert_eq!(ask(&mut scheduler, 1, 0, size(10)), Vec::<usize>::new(), "short");
    assert_eq!(ask(&mut scheduler, 2, 1, size(20)), Vec::<usize>::new(), "long beside short");
    assert_eq!(scheduler.status(now).used, Bytes(90));
    // A file of its own that needs what both hold together: both go, and everything is free again.
    let alone = Estimate { weights: Bytes(95), ..Estimate::default() };
    assert_eq!(ask(&mut scheduler, 3, 2, alone), [0, 1]);
    assert_eq!(scheduler.status(now).used, Bytes(95));
}

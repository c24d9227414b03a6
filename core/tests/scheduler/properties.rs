//! Generated histories against a reference model. The world checks the invariants after every effect; this file
//! predicts, from its own account of who is loaded and who waits, what must and must not happen.

use std::time::Duration;

use proptest::prelude::*;
use sarai_core::Error;
use sarai_core::answer::Priority;
use sarai_core::config::Class;
use sarai_core::failure::FailureKind;
use sarai_core::scheduler::{Event, Eviction, Limits, Phase, RequestId, SlotId};
use sarai_core::units::Bytes;

use crate::world::{Model, Outcome, World, helper, limits, llm};

/// Something the outside world does. Numbers are taken modulo what there is to choose from.
#[derive(Clone, Copy, Debug)]
enum Step {
    Request { slot: usize, priority: Priority, wait: u64 },
    GiveBack(usize),
    Leave(usize),
    FinishLoad(usize),
    FinishLoadTaking(usize, u64),
    Grow(usize, u64),
    FailLoad(usize),
    FinishUnload(usize),
    FinishResize(usize),
    FailResize(usize),
    Lose(usize),
    Unload(usize),
    Pin(usize, bool),
    Memory(u64),
    Budget(u64),
    Others(u64),
    OthersUnseen(u64),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let priority =
        prop_oneof![Just(Priority::Background), Just(Priority::Normal), Just(Priority::Interactive)];
    prop_oneof![
        8 => (0..8usize, priority, 1..200u64).prop_map(|(slot, priority, wait)| Step::Request { slot, priority, wait }),
        6 => any::<usize>().prop_map(Step::GiveBack),
        2 => any::<usize>().prop_map(Step::Leave),
        5 => any::<usize>().prop_map(Step::FinishLoad),
        1 => (any::<usize>(), 0..30u64).prop_map(|(n, more)| Step::FinishLoadTaking(n, more)),
        1 => (any::<usize>(), 1..20u64).prop_map(|(n, more)| Step::Grow(n, more)),
        1 => any::<usize>().prop_map(Step::FailLoad),
        6 => any::<usize>().prop_map(Step::FinishUnload),
        4 => any::<usize>().prop_map(Step::FinishResize),
        1 => any::<usize>().prop_map(Step::FailResize),
        1 => any::<usize>().prop_map(Step::Lose),
        1 => (0..8usize).prop_map(Step::Unload),
        1 => (0..8usize, any::<bool>()).prop_map(|(slot, pinned)| Step::Pin(slot, pinned)),
        1 => (20..250u64).prop_map(Step::Memory),
        1 => (40..160u64).prop_map(Step::Budget),
        1 => (0..80u64).prop_map(Step::Others),
        1 => (0..80u64).prop_map(Step::OthersUnseen),
        3 => (0..20u64).prop_map(Step::Pass),
    ]
}

fn model(name: usize) -> impl Strategy<Value = Model> {
    let class = prop_oneof![
        1 => Just(Class::Ephemeral), 3 => Just(Class::OnDemand), 1 => Just(Class::Preferred)
    ];
    (1..70u64, class, 1..3usize, prop::option::of(5..60u64), 0..10u8, 0..4u64).prop_map(
        move |(size, class, parallel, ttl, kind, quarters)| {
            // Some slots share a model, as a host and its local fallback do; some are helpers.
            let mut model = match kind {
                0 => helper(&format!("helper{name}"), size / 5),
                1 => llm("shared", size),
                2 => llm("shared", 0),
                _ => llm(&format!("m{name}"), size),
            };
            if kind > 0 {
                model.spec.class = class;
                model.spec.parallel = parallel;
                model.spec.ttl = ttl.map(Duration::from_secs);
            }
            let context = model.size * quarters / 4;
            model.context(context)
        },
    )
}

fn world() -> impl Strategy<Value = World> {
    let models = (0..8usize).map(model).collect::<Vec<_>>();
    let eviction = prop_oneof![Just(Eviction::Lru), Just(Eviction::CostAware)];
    let left_alone = (0..4u64, 0..20u64);
    (models, 60..160u64, 1..5usize, eviction, left_alone).prop_map(
        |(models, budget, max_concurrent_llms, eviction, (spare, reserve))| {
            let limits = limits(budget, max_concurrent_llms);
            let (spare, reserve) = (Bytes(spare), Bytes(reserve));
            World::new(Limits { eviction, spare, reserve, ..limits }, models)
        },
    )
}

/// What the outside knew of the pool right before a request.
struct Before {
    ready_and_free: bool,
    never_fits: bool,
    fits: bool,
    backing_off: bool,
    someone_waits: bool,
}

fn before(world: &World, slot: usize) -> Before {
    let status = world.scheduler.status(world.now);
    let spec = &world.models[slot].spec;
    let pinned: u64 = (world.pinned.iter().filter(|pinned| pinned.0 != slot))
        .map(|pinned| status.slots[pinned.0].reserved.0)
        .sum();
    let leases = world.leases.values().filter(|used| used.0 == slot).count();
    let absent = status.slots[slot].phase == Phase::Absent;
    let shares_place = status.slots.iter().zip(&world.models).any(|(other, model)| {
        model.spec.llm
            && model.spec.model == spec.model
            && matches!(other.phase, Phase::Loading | Phase::Resizing | Phase::Ready)
    });
    let (asks, spare) = (world.asks(slot), world.scheduler.limits().spare.0);
    let (budget, reserve) = (world.limits.budget.0, world.limits.reserve.0);
    let will_hold = world.held() + asks + spare;
    let free_place = !spec.llm || shares_place || world.llms() < world.limits.max_concurrent_llms;
    Before {
        ready_and_free: world.loaded.contains(&SlotId(slot))
            && !world.lost.contains(&SlotId(slot))
            // One that has a shorter context may get its whole one first.
            && world.is_whole(slot)
            && !world.resizing.contains(&SlotId(slot))
            && leases < spec.parallel,
        never_fits: absent && asks > budget.saturating_sub(pinned + spare),
        fits: absent
            && will_hold + world.really <= budget
            && will_hold <= status.limit.0
            && world.machine_has.is_none_or(|has| world.held() + asks + reserve <= has)
            && free_place,
        backing_off: status.slots[slot].failure.is_some(),
        someone_waits: !world.waiting.is_empty(),
    }
}

/// A request, and whether what followed is what the reference expects.
fn request(world: &mut World, slot: usize, priority: Priority, wait: u64) {
    let slot = slot % world.models.len();
    let before = before(world, slot);
    let loads = world.loading.len();
    let id = world.request_with(slot, priority, Duration::from_secs(wait));
    if before.backing_off {
        assert!(
            matches!(world.rejection(id), Some(Error::LoadBackoff { .. })),
            "{:?}",
            world.outcomes.get(&id)
        );
    } else if before.never_fits {
        let refused = matches!(world.rejection(id), Some(Error::OverBudget { .. } | Error::QueueFull { .. }));
        assert!(refused, "{:?}", world.outcomes.get(&id));
    } else if before.ready_and_free && !before.someone_waits {
        assert!(world.is_granted(id), "ready, free and first in line: {:?}", world.outcomes.get(&id));
    } else if before.fits && !before.someone_waits {
        assert_eq!(world.loading.len(), loads + 1, "it fits and nobody was before it");
    }
}

fn play(world: &mut World, step: Step) {
    match step {
        Step::Request { slot, priority, wait } => request(world, slot, priority, wait),
        Step::GiveBack(n) => {
            if let Some(id) = nth(world.leases.keys(), n) {
                world.give_back(id);
            }
        }
        Step::Leave(n) => {
            if let Some(id) = nth(world.waiting.keys(), n) {
                world.give_back(id);
            }
        }
        Step::FinishLoad(n) => {
            if let Some(slot) = nth(world.loading.iter(), n) {
                world.finish_load(slot.0);
            }
        }
        Step::FinishLoadTaking(n, more) => {
            if let Some(slot) = nth(world.loading.iter(), n) {
                world.finish_load_taking(slot.0, world.holds(slot.0) + more);
            }
        }
        Step::Grow(n, more) => {
            let slot = nth(world.loaded.iter(), n);
            let ready = |slot: &SlotId| !world.resizing.contains(slot) && !world.lost.contains(slot);
            if let Some(slot) = slot.filter(ready) {
                world.grow(slot.0, world.holds(slot.0) + more);
            }
        }
        Step::FailLoad(n) => {
            if let Some(slot) = nth(world.loading.iter(), n) {
                let given_up = world.cancelled.contains(&slot);
                world.fail_load(slot.0, if given_up { FailureKind::Cancelled } else { FailureKind::Engine });
            }
        }
        Step::FinishUnload(n) => {
            if let Some(slot) = nth(world.unloading.iter(), n) {
                world.finish_unload(slot.0);
            }
        }
        Step::FinishResize(n) => {
            if let Some(slot) = nth(world.resizing.iter(), n) {
                world.finish_resize(slot.0, false);
            }
        }
        Step::FailResize(n) => {
            if let Some(slot) = nth(world.resizing.iter(), n) {
                world.finish_resize(slot.0, true);
            }
        }
        Step::Lose(n) => {
            let slot = nth(world.loaded.iter(), n);
            if let Some(slot) = slot.filter(|slot| !world.resizing.contains(slot)) {
                world.lose(slot.0);
            }
        }
        Step::Unload(slot) => world.unload(slot % world.models.len()),
        Step::Pin(slot, pinned) => world.pin(slot % world.models.len(), pinned),
        Step::Memory(attainable) => world.memory(attainable),
        Step::Budget(budget) => world.budget(budget),
        Step::Others(taken) => world.others(taken),
        Step::OthersUnseen(taken) => world.really = taken,
        Step::Pass(seconds) => world.pass(Duration::from_secs(seconds)),
    }
    assert_eq!(world.scheduler.status(world.now).used.0, world.held(), "the ledger and the world differ");
    assert_eq!(world.scheduler.status(world.now).waiting, world.waiting.len());
}

fn nth<'a, T: Copy + 'a>(mut of: impl ExactSizeIterator<Item = &'a T>, n: usize) -> Option<T> {
    let len = of.len();
    (len > 0).then(|| of.nth(n % len)).flatten().copied()
}

/// Nothing new comes; everything under way ends and every lease is returned: then nobody may still wait.
fn run_dry(world: &mut World) {
    for slot in 0..world.models.len() {
        world.pin(slot, false);
    }
    world.memory(1_000_000);
    world.others(0);
    for _ in 0..10_000 {
        world.settle();
        match world.leases.keys().next().copied() {
            Some(id) => world.give_back(id),
            // Models that were pushed about stay a moment.
            None if world.scheduler.poll_timeout().is_some() && !world.waiting.is_empty() => {
                world.pass(Duration::from_secs(1));
            }
            None => break,
        }
    }
    assert!(world.waiting.is_empty(), "still waiting with everything idle: {:?}", world.waiting);
    for (id, outcome) in &world.outcomes {
        if let Outcome::Rejected(error @ (Error::ShuttingDown | Error::Unsupported { .. })) = outcome {
            panic!("{id:?}: {error}");
        }
    }
    world.event(Event::Shutdown);
    world.settle();
    assert!(world.stopped);
    assert_eq!(world.held(), 0);
}

proptest! {
    // 500 histories of 250 steps: 125,000 generated events, besides those that follow from them.
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_an_invariant_or_leaves_a_request_unanswered(
        mut world in world(),
        steps in prop::collection::vec(step(), 250),
    ) {
        for step in steps {
            play(&mut world, step);
        }
        run_dry(&mut world);
    }

    #[test]
    fn the_same_history_gives_the_same_decisions(
        models in (0..8usize).map(model).collect::<Vec<_>>(),
        steps in prop::collection::vec(step(), 100),
    ) {
        let outcome = || {
            let mut world = World::new(limits(100, 3), models.clone());
            for step in &steps {
                play(&mut world, *step);
            }
            let answered: Vec<(RequestId, String)> =
                world.outcomes.iter().map(|(id, outcome)| (*id, format!("{outcome:?}"))).collect();
            (answered, world.changes)
        };
        prop_assert_eq!(outcome(), outcome());
    }
}

//! One test per hazard.

use std::time::Duration;

use sarai_core::Error;
use sarai_core::answer::Priority;
use sarai_core::config::Class;
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::{Estimate, Footprint};
use sarai_core::scheduler::{Cause, Event, Eviction, Limits, Phase, SlotId};
use sarai_core::units::Bytes;

use crate::world::{World, helper, limits, llm, measured};

fn three_of(budget: u64, max_concurrent_llms: usize) -> World {
    World::new(
        limits(budget, max_concurrent_llms),
        vec![llm("a", 40), llm("b", 40), llm("c", 40), llm("d", 40)],
    )
}

/// Loads a slot and returns its lease.
fn used_once(world: &mut World, slot: usize) {
    let id = world.request(slot);
    world.settle();
    assert!(world.is_granted(id));
    world.give_back(id);
    world.pass(Duration::from_secs(1));
}

#[test]
fn requests_for_a_loading_model_join_its_load() {
    let mut world = three_of(100, 3);
    let (first, second) = (world.request(0), world.request(0));
    assert_eq!(world.loading.len(), 1);
    world.finish_load(0);
    assert!(world.is_granted(first) && !world.is_granted(second), "one at a time on this slot");
    world.give_back(first);
    assert!(world.is_granted(second));
}

#[test]
fn loads_run_side_by_side_when_there_is_room_for_all() {
    let mut world = three_of(120, 3);
    world.request(0);
    world.request(1);
    world.request(2);
    assert_eq!(world.loading, [SlotId(0), SlotId(1), SlotId(2)]);
}

#[test]
fn a_slow_load_delays_neither_a_ready_model_nor_a_load_that_fits() {
    let mut world = three_of(120, 3);
    used_once(&mut world, 1);
    world.request(0);
    let ready = world.request(1);
    assert!(world.is_granted(ready));
    let other = world.request(2);
    world.finish_load(2);
    assert!(world.is_granted(other));
    assert_eq!(world.phase(0), Phase::Loading);
}

#[test]
fn two_loads_together_do_not_overshoot_the_budget() {
    let mut world = three_of(79, 3);
    world.request(0);
    world.request(1);
    assert_eq!(world.loading, [SlotId(0)]);
    assert_eq!(world.phase(1), Phase::Waiting);
}

#[test]
fn the_least_recently_used_idle_model_makes_room_for_a_fourth() {
    let mut world = three_of(1000, 3);
    for slot in [1, 0, 2] {
        used_once(&mut world, slot);
    }
    let fourth = world.request(3);
    assert_eq!(world.unloading, [SlotId(1)]);
    assert!(world.loading.is_empty(), "its place is free when the memory is back");
    world.settle();
    assert!(world.is_granted(fourth));
    assert_eq!(world.loaded(), [0, 2, 3]);
}

#[test]
fn with_all_busy_a_fourth_waits_and_then_runs() {
    let mut world = three_of(1000, 3);
    let busy: Vec<_> = [0, 1, 2].map(|slot| world.request(slot)).into();
    world.settle();
    let fourth = world.request(3);
    assert!(world.unloading.is_empty() && world.loading.is_empty());
    world.give_back(busy[1]);
    assert_eq!(world.unloading, [SlotId(1)]);
    world.settle();
    assert!(world.is_granted(fourth));
}

#[test]
fn five_models_in_a_row_under_a_budget_for_two_never_exceed_it() {
    let models = ["a", "b", "c", "d", "e"].map(|name| llm(name, 50)).into();
    let mut world = World::new(limits(100, 9), models);
    for slot in 0..5 {
        used_once(&mut world, slot);
        assert!(world.loaded.len() <= 2);
    }
    assert!(world.changes.iter().all(|change| change.used <= Bytes(100)));
    assert_eq!(world.scheduler.status(world.now).peak, Bytes(100));
}

#[test]
fn a_model_larger_than_the_budget_is_refused_with_the_numbers_and_evicts_nothing() {
    let mut world =
        World::new(limits(100, 3), vec![llm("small", 40), llm("huge", 500), helper("embedding", 10)]);
    used_once(&mut world, 0);
    used_once(&mut world, 2);
    let huge = world.request(1);
    match world.rejection(huge) {
        Some(Error::OverBudget { asked, left, budget, holders, .. }) => {
            assert_eq!((asked.0, left.0, budget.0), (500, 90, 100));
            assert_eq!(holders.len(), 1, "only pinned ones count: {holders:?}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(world.loaded(), [0, 2]);
    assert!(world.unloading.is_empty());
}

#[test]
fn the_smallest_sufficient_set_is_evicted() {
    let mut world = World::new(limits(100, 9), vec![llm("a", 10), llm("b", 60), llm("c", 20), llm("d", 60)]);
    for slot in 0..3 {
        used_once(&mut world, slot);
    }
    world.request(3);
    assert_eq!(world.unloading, [SlotId(1)], "the older and smaller one would not have helped");
}

#[test]
fn one_load_does_not_evict_again_what_is_already_on_its_way_out() {
    let mut world = three_of(120, 9);
    for slot in 0..3 {
        used_once(&mut world, slot);
    }
    world.request(3);
    world.pass(Duration::from_secs(1));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.unloading.len(), 1);
}

#[test]
fn many_waiters_for_one_model_evict_no_more_than_one_does() {
    let mut world = three_of(120, 9);
    for slot in 0..3 {
        used_once(&mut world, slot);
    }
    for _ in 0..4 {
        world.request(3);
    }
    assert_eq!(world.unloading.len(), 1);
}

#[test]
fn a_resident_is_never_evicted_and_its_requests_do_not_wait_behind_a_load() {
    let mut world = World::new(limits(100, 1), vec![llm("a", 60), llm("b", 60), helper("embedding", 30)]);
    used_once(&mut world, 2);
    let busy = world.request(0);
    world.settle();
    let waits = world.request(1);
    let embedding = world.request(2);
    assert!(world.is_granted(embedding));
    world.give_back(busy);
    assert_eq!(world.unloading, [SlotId(0)]);
    world.settle();
    assert!(world.is_granted(waits));
    assert!(world.loaded.contains(&SlotId(2)));
}

#[test]
fn a_pinned_model_is_not_evicted_until_it_is_unpinned() {
    let mut world = three_of(80, 9);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    world.pin(0, true);
    world.request(2);
    assert_eq!(world.unloading, [SlotId(1)]);
    world.settle();
    world.pin(0, false);
    world.request(3);
    assert_eq!(world.unloading, [SlotId(0)]);
}

#[test]
fn when_all_places_are_pinned_another_llm_is_refused() {
    let mut world = three_of(1000, 1);
    used_once(&mut world, 0);
    world.pin(0, true);
    let second = world.request(1);
    assert!(matches!(world.rejection(second), Some(Error::TooManyLlms { limit: 1, .. })));
}

#[test]
fn a_model_with_a_waiting_user_is_no_victim() {
    let mut world = three_of(80, 9);
    let (a, _b) = (world.request(0), world.request(1));
    world.settle();
    let third = world.request(2);
    let again = world.request(0);
    world.give_back(a);
    assert!(world.is_granted(again), "its next user was there already");
    assert!(world.unloading.is_empty() && !world.is_granted(third));
}

#[test]
fn a_model_under_steady_use_gives_way_to_one_that_has_waited_long() {
    let mut world = three_of(40, 9);
    let mut user = world.request(0);
    world.settle();
    let starved = world.request(1);
    for _ in 0..10 {
        let next = world.request(0);
        world.give_back(user);
        world.pass(Duration::from_secs(1));
        user = next;
        world.settle();
    }
    assert!(world.outcomes.contains_key(&starved), "still waiting after ten requests for the other model");
}

#[test]
fn who_waits_long_for_bytes_does_not_keep_others_from_what_takes_none() {
    let mut world = World::new(limits(40, 3), vec![llm("a", 40), llm("b", 40), llm("remote", 0)]);
    world.request(0);
    world.settle();
    let starved = world.request(1);
    world.pass(Duration::from_secs(20));
    let remote = world.request(2);
    world.settle();
    assert!(world.is_granted(remote) && !world.is_granted(starved), "{:?}", world.outcomes);
}

#[test]
fn a_ttl_that_ends_while_someone_waits_for_the_model_does_not_wake_the_pool_again_and_again() {
    let mut models = vec![llm("x", 40), llm("y", 60), llm("z", 100)];
    models[0].spec.ttl = Some(Duration::from_secs(30));
    let mut world = World::new(limits(100, 9), models);
    used_once(&mut world, 0);
    world.request(1);
    world.settle();
    world.request(2);
    world.pass(Duration::from_secs(20));
    // Held back: the one who has waited long needs this model's room.
    world.request(0);
    world.pass(Duration::from_secs(20));
    let wake = world.scheduler.poll_timeout().unwrap();
    assert!(wake > world.now, "{wake:?} at {:?}", world.now);
}

#[test]
fn room_that_came_meanwhile_is_offered_to_the_next_estimate() {
    let mut world = three_of(100, 9);
    let (first, second) = (world.request(0), world.request(1));
    world.settle();
    world.request(2);
    assert_eq!(world.offered.last(), Some(&(SlotId(2), Bytes(20))));
    world.give_back(first);
    world.give_back(second);
    world.settle();
    assert_eq!(world.offered.last(), Some(&(SlotId(2), Bytes(60))), "after one model has gone");
    assert_eq!(world.loaded(), [1, 2]);
}

#[test]
fn a_load_that_took_too_much_once_is_refused_next_time_without_another_try() {
    let mut world = three_of(100, 9);
    world.request(0);
    world.settle();
    world.pin(0, true);
    world.request(1);
    world.finish_load_taking(1, 90);
    world.settle();
    let again = world.request(1);
    assert!(matches!(world.rejection(again), Some(Error::OverBudget { asked: Bytes(90), .. })));
    assert!(world.loading.is_empty());
}

#[test]
fn the_last_waiter_to_leave_stops_the_load_and_the_first_does_not() {
    let mut world = three_of(100, 3);
    let (first, second) = (world.request(0), world.request(0));
    world.give_back(first);
    assert!(world.cancelled.is_empty());
    world.give_back(second);
    assert!(world.cancelled.contains(&SlotId(0)));
    world.fail_load(0, FailureKind::Cancelled);
    assert_eq!((world.phase(0), world.held()), (Phase::Absent, 0));
    let later = world.request(0);
    assert!(world.rejection(later).is_none(), "giving up is no failure");
}

#[test]
fn joining_a_load_that_is_being_given_up_starts_a_new_one() {
    let mut world = three_of(100, 3);
    let first = world.request(0);
    world.give_back(first);
    let second = world.request(0);
    world.fail_load(0, FailureKind::Cancelled);
    assert_eq!(world.loading, [SlotId(0)]);
    world.finish_load(0);
    assert!(world.is_granted(second));
}

#[test]
fn every_waiter_of_a_failed_load_hears_of_it_and_the_next_try_comes_later() {
    let mut world = three_of(100, 3);
    let waiters = [world.request(0), world.request(0)];
    world.fail_load(0, FailureKind::Engine);
    for id in waiters {
        assert!(
            matches!(world.rejection(id), Some(Error::Load { cause, .. }) if cause.kind == FailureKind::Engine)
        );
    }
    let soon = world.request(0);
    match world.rejection(soon) {
        Some(Error::LoadBackoff { retry_in, .. }) => assert_eq!(*retry_in, Duration::from_secs(10)),
        other => panic!("{other:?}"),
    }
    world.pass(Duration::from_secs(10));
    world.request(0);
    world.fail_load(0, FailureKind::Engine);
    let soon = world.request(0);
    match world.rejection(soon) {
        Some(Error::LoadBackoff { retry_in, .. }) => {
            assert_eq!(*retry_in, Duration::from_secs(20), "doubled")
        }
        other => panic!("{other:?}"),
    }
    world.pass(Duration::from_secs(20));
    let late = world.request(0);
    world.settle();
    assert!(world.is_granted(late));
}

#[test]
fn a_failed_estimate_is_told_and_tried_again_at_once() {
    let mut world = three_of(100, 3);
    let ask = sarai_core::scheduler::Ask {
        capability: sarai_core::request::Capability::Generate,
        priority: Priority::Normal,
        deadline: world.now + Duration::from_secs(9),
        spare: None,
    };
    let id = sarai_core::scheduler::RequestId(77);
    world.waiting.insert(id, SlotId(0));
    world.event(Event::Request { id, slot: SlotId(0), ask });
    world.estimating.clear();
    let missing = Failure::new(FailureKind::FileMissing, "no such file");
    world.event(Event::Estimated { slot: SlotId(0), left: Bytes::ZERO, short: false, result: Err(missing) });
    assert!(matches!(world.rejection(id), Some(Error::Load { .. })));
    let again = world.request(0);
    world.settle();
    assert!(world.is_granted(again));
}

#[test]
fn a_request_gives_up_at_its_deadline_and_takes_its_load_with_it() {
    let mut world = three_of(40, 3);
    let busy = world.request(0);
    world.settle();
    let id = world.request_with(1, Priority::Normal, Duration::from_secs(3));
    assert_eq!(world.scheduler.poll_timeout(), Some(world.now + Duration::from_secs(3)));
    world.pass(Duration::from_secs(3));
    match world.rejection(id) {
        Some(Error::WaitTimeout { waited, holders, .. }) => {
            assert_eq!((*waited, holders[0].bytes), (Duration::from_secs(3), Bytes(40)));
        }
        other => panic!("{other:?}"),
    }
    world.give_back(busy);
    assert!(world.loading.is_empty() && world.unloading.is_empty(), "nobody wants it any more");
}

#[test]
fn the_more_urgent_request_goes_first_and_waiting_makes_urgent() {
    let mut world = three_of(1000, 3);
    let running = world.request(0);
    world.settle();
    let background = world.request_with(0, Priority::Background, Duration::from_secs(900));
    let interactive = world.request_with(0, Priority::Interactive, Duration::from_secs(900));
    world.give_back(running);
    assert!(world.is_granted(interactive) && !world.is_granted(background));
    world.pass(Duration::from_secs(60));
    let late = world.request_with(0, Priority::Interactive, Duration::from_secs(900));
    world.give_back(interactive);
    assert!(world.is_granted(background), "two classes up in a minute, and it came first");
    assert!(!world.is_granted(late));
}

#[test]
fn equal_requests_are_served_in_the_order_they_came() {
    let mut world = three_of(1000, 3);
    let mut running = world.request(0);
    world.settle();
    let queued: Vec<_> = (0..4).map(|_| world.request(0)).collect();
    for next in queued {
        world.give_back(running);
        assert!(world.is_granted(next));
        running = next;
    }
}

#[test]
fn the_queue_is_bounded_and_says_so() {
    let mut world = three_of(1000, 3);
    world.request(0);
    for _ in 0..7 {
        world.request(0);
    }
    let one_too_many = world.request(0);
    assert!(matches!(world.rejection(one_too_many), Some(Error::QueueFull { waiting: 8 })));
}

#[test]
fn a_full_queue_does_not_keep_out_who_can_be_served_at_once() {
    let mut world = three_of(1000, 3);
    used_once(&mut world, 1);
    for _ in 0..8 {
        world.request(0);
    }
    let ready = world.request(1);
    assert!(world.is_granted(ready));
}

#[test]
fn an_idle_model_is_unloaded_after_its_ttl_and_not_while_it_is_used() {
    let mut model = llm("a", 10);
    model.spec.ttl = Some(Duration::from_secs(45));
    let mut world = World::new(limits(100, 3), vec![model]);
    let id = world.request(0);
    world.settle();
    world.pass(Duration::from_secs(100));
    assert!(world.unloading.is_empty());
    world.give_back(id);
    assert_eq!(world.scheduler.poll_timeout(), Some(world.now + Duration::from_secs(45)));
    world.pass(Duration::from_secs(44));
    assert!(world.unloading.is_empty());
    world.pass(Duration::from_secs(1));
    assert_eq!(world.unloading, [SlotId(0)]);
}

#[test]
fn a_request_for_a_model_on_its_way_out_waits_and_loads_it_again() {
    let mut world = three_of(100, 3);
    used_once(&mut world, 0);
    world.unload(0);
    let id = world.request(0);
    assert!(world.loading.is_empty());
    world.finish_unload(0);
    assert_eq!(world.unload_results.len(), 1);
    assert_eq!(*world.unload_results[0].as_ref().unwrap(), Bytes(40));
    world.settle();
    assert!(world.is_granted(id));
}

#[test]
fn unloading_is_idempotent_and_refuses_what_is_used_or_pinned() {
    let mut world = three_of(100, 3);
    world.unload(0);
    assert_eq!(*world.unload_results[0].as_ref().unwrap(), Bytes::ZERO);
    let id = world.request(0);
    world.settle();
    world.unload(0);
    assert!(matches!(world.unload_results[1], Err(Error::InUse { leases: 1, .. })));
    world.give_back(id);
    world.pin(0, true);
    world.unload(0);
    assert!(matches!(world.unload_results[2], Err(Error::Pinned { .. })));
    world.pin(0, false);
    world.unload(0);
    world.unload(0);
    world.settle();
    assert!(world.unload_results[3..].iter().all(|result| *result.as_ref().unwrap() == Bytes(40)));
    assert_eq!(world.unload_results.len(), 5);
}

#[test]
fn places_of_one_model_count_as_one_llm() {
    let (mut remote, mut local) = (llm("solar", 0), llm("solar", 40));
    remote.spec.parallel = 4;
    local.spec.parallel = 1;
    let mut world = World::new(limits(1000, 2), vec![remote, local, llm("b", 40)]);
    used_once(&mut world, 0);
    used_once(&mut world, 2);
    let fallback = world.request(1);
    world.settle();
    assert!(world.is_granted(fallback));
    assert_eq!(world.loaded(), [0, 1, 2]);
}

#[test]
fn a_smaller_budget_evicts_what_is_idle_and_leaves_what_runs() {
    let mut world = three_of(120, 9);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    let running = world.request(2);
    world.settle();
    world.budget(40);
    assert_eq!(world.unloading, [SlotId(0), SlotId(1)]);
    world.settle();
    assert!(world.leases.contains_key(&running));
    assert_eq!(world.loaded(), [2]);
}

/// Three models of 40 in a budget of 200 on a machine of which 16 stay free.
fn on_a_machine_with_a_reserve() -> World {
    let mut limits = limits(200, 9);
    limits.reserve = Bytes(16);
    World::new(limits, vec![llm("a", 40), llm("b", 40), llm("c", 40)])
}

#[test]
fn idle_models_leave_while_the_machine_is_short_of_memory_and_the_reserve_is_left_alone_then() {
    let mut world = on_a_machine_with_a_reserve();
    world.memory(300);
    for slot in 0..3 {
        used_once(&mut world, slot);
        world.pass(Duration::from_secs(1));
    }
    // 120 are held. Half of the reserve may be used up before anything happens.
    world.memory(129);
    assert_eq!(world.unloading, []);
    world.memory(125);
    assert_eq!(world.unloading, [SlotId(0)], "the least recently used one, and no more than needed");
    assert_eq!(world.changes.last().unwrap().cause, Cause::Pressure);
    world.settle();
    // A new one has to leave the whole reserve alone.
    let again = world.request(0);
    assert_eq!(world.unloading, [SlotId(1)], "109 may be held");
    world.settle();
    assert!(world.is_granted(again));
}

#[test]
fn a_model_in_use_stays_when_memory_is_short_and_goes_when_it_is_idle() {
    let mut world = on_a_machine_with_a_reserve();
    let running = world.request(0);
    world.settle();
    world.memory(30);
    assert_eq!(world.unloading, []);
    world.give_back(running);
    assert_eq!(world.unloading, [SlotId(0)]);
}

#[test]
fn who_finds_the_machine_short_waits_for_it_and_is_told_so_in_the_end() {
    let mut world = on_a_machine_with_a_reserve();
    world.memory(50);
    let patient = world.request(0);
    let hasty = world.request_with(1, Priority::Normal, Duration::from_secs(5));
    assert!(world.scheduler.waits_for_memory());
    assert_eq!(world.loading, [], "34 may be held");
    world.pass(Duration::from_secs(5));
    let Some(Error::WaitTimeout { machine, .. }) = world.rejection(hasty) else {
        panic!("{:?}", world.outcomes)
    };
    assert_eq!(*machine, Some(Bytes(34)));
    world.memory(300);
    world.settle();
    assert!(world.is_granted(patient));
}

#[test]
fn a_reading_that_differs_by_little_changes_nothing() {
    let mut world = on_a_machine_with_a_reserve();
    let limit = |world: &World| world.scheduler.status(world.now).limit.0;
    world.memory(128);
    assert_eq!(limit(&world), 112);
    world.memory(127);
    assert_eq!(limit(&world), 112, "less than an eighth of the reserve");
    world.memory(126);
    assert_eq!(limit(&world), 110);
    // On a small machine, by a part of what it has.
    let mut limits = limits(200, 9);
    limits.reserve = Bytes(160);
    let mut world = World::new(limits, vec![llm("a", 40)]);
    world.memory(320);
    world.memory(316);
    assert_eq!(limit(&world), 160);
    world.memory(315);
    assert_eq!(limit(&world), 155);
}

#[test]
fn on_a_large_machine_half_of_the_reserve_is_not_used_up_unseen() {
    let mut limits = limits(60_000, 9);
    limits.reserve = Bytes(1000);
    let mut world = World::new(limits, vec![llm("a", 40_000)]);
    world.memory(64_000);
    used_once(&mut world, 0);
    // A sixty-fourth of what this process could hold is as much as the whole reserve.
    world.memory(41_000);
    assert_eq!(world.unloading, []);
    world.memory(40_400);
    assert_eq!(world.unloading, [SlotId(0)]);
}

#[test]
fn one_load_does_not_evict_what_another_unload_will_free() {
    // Two are leaving when the third comes: their memory is on its way, and nobody else has to go.
    let mut world = World::new(limits(160, 9), (0..5).map(|n| llm(&format!("m{n}"), 40)).collect());
    for slot in 0..4 {
        used_once(&mut world, slot);
        world.pass(Duration::from_secs(1));
    }
    world.unload(0);
    world.unload(1);
    world.request(4);
    assert_eq!(world.unloading, [SlotId(0), SlotId(1)]);
    world.finish_unload(0);
    assert_eq!(world.loading, [SlotId(4)]);
    assert_eq!(world.unloading, [SlotId(1)]);
}

#[test]
fn a_load_that_took_more_than_estimated_makes_idle_models_leave() {
    let mut world = three_of(100, 9);
    used_once(&mut world, 0);
    world.request(1);
    world.finish_load_taking(1, 90);
    assert_eq!(world.unloading, [SlotId(0)]);
    assert_eq!(world.changes.last().unwrap().cause, Cause::Budget);
}

#[test]
fn a_load_that_took_more_than_can_be_made_good_is_taken_back_and_its_waiters_hear_the_figure() {
    let mut world = three_of(100, 9);
    world.request(0);
    world.settle();
    let waiting = world.request(1);
    world.finish_load_taking(1, 90);
    let Some(Error::OverBudget { asked, left, .. }) = world.rejection(waiting) else {
        panic!("{:?}", world.outcomes)
    };
    assert_eq!((*asked, *left), (Bytes(90), Bytes(60)), "the other model is in use");
    assert_eq!(world.unloading, [SlotId(1)]);
    world.settle();
    assert_eq!(world.loading, [], "nobody waits for it any more");
}

#[test]
fn a_model_whose_engine_has_ended_gets_nobody_new_and_goes_when_the_last_lease_is_back() {
    let mut models = vec![llm("a", 40)];
    models[0].spec.parallel = 2;
    let mut world = World::new(limits(100, 9), models);
    let running = [world.request(0), world.request(0)];
    world.settle();
    world.lose(0);
    let late = [world.request(0), world.request(0)];
    world.give_back(running[0]);
    assert!(world.unloading.is_empty() && !late.iter().any(|id| world.is_granted(*id)));
    world.give_back(running[1]);
    assert_eq!(world.unloading, [SlotId(0)]);
    world.settle();
    for id in late {
        assert!(matches!(world.rejection(id), Some(Error::LoadBackoff { .. })), "{:?}", world.outcomes);
    }
    world.pass(Duration::from_secs(10));
    let again = world.request(0);
    world.settle();
    assert!(world.is_granted(again));
}

#[test]
fn pinning_an_llm_does_not_put_its_load_before_more_urgent_ones() {
    let mut world = three_of(40, 9);
    world.pin(0, true);
    let busy = world.request(2);
    world.settle();
    let pinned = world.request_with(0, Priority::Normal, Duration::from_secs(100));
    let urgent = world.request_with(1, Priority::Interactive, Duration::from_secs(100));
    world.give_back(busy);
    world.settle();
    assert!(world.is_granted(urgent) && !world.is_granted(pinned), "{:?}", world.outcomes);
}

#[test]
fn a_preferred_model_outlives_the_others() {
    let mut models = vec![llm("kept", 40), llm("b", 40), llm("c", 40)];
    models[0].spec.class = Class::Preferred;
    let mut world = World::new(limits(80, 9), models);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    world.request(2);
    assert_eq!(world.unloading, [SlotId(1)]);
}

#[test]
fn shutdown_lets_running_requests_end_and_then_unloads_everything() {
    let mut world = World::new(limits(1000, 9), vec![llm("a", 40), llm("b", 40), helper("embedding", 10)]);
    used_once(&mut world, 2);
    let running = world.request(0);
    world.settle();
    let waiting = world.request(0);
    let loading = world.request(1);
    world.event(Event::Shutdown);
    assert!(matches!(world.rejection(waiting), Some(Error::ShuttingDown)));
    assert!(matches!(world.rejection(loading), Some(Error::ShuttingDown)));
    assert!(world.cancelled.contains(&SlotId(1)));
    world.settle();
    assert!(!world.stopped, "a request still runs");
    world.give_back(running);
    world.settle();
    assert!(world.stopped);
    assert_eq!(world.held(), 0);
    let late = world.request(0);
    assert!(matches!(world.rejection(late), Some(Error::ShuttingDown)));
}

#[test]
fn the_end_of_a_shutdowns_grace_unloads_what_is_still_used() {
    let mut world = three_of(1000, 9);
    let running = world.request(0);
    world.settle();
    world.event(Event::Shutdown);
    world.abort();
    world.settle();
    assert!(world.stopped);
    world.give_back(running);
}

#[test]
fn a_plan_says_what_would_happen_and_changes_nothing() {
    let mut world = three_of(100, 9);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    let before = format!("{:?}", world.scheduler.status(world.now));
    let sizes = |slot: SlotId| {
        let size = if slot.0 == 3 { 500 } else { 40 };
        Ok(Estimate { weights: Bytes(size), ..Estimate::default() })
    };
    let plans = world.scheduler.plan(&[SlotId(1), SlotId(2), SlotId(3)], &sizes, world.now);
    assert!(plans[0].fits && plans[0].load.is_empty() && plans[0].evict.is_empty());
    assert!(plans[1].fits);
    assert_eq!(plans[1].load[0].slot, SlotId(2));
    assert_eq!(plans[1].evict.iter().map(ToString::to_string).collect::<Vec<_>>(), ["a"]);
    assert!(matches!(plans[2].refuse, Some(Error::OverBudget { .. })));
    assert!(!plans[2].fits && plans[2].evict.is_empty());
    assert_eq!(format!("{:?}", world.scheduler.status(world.now)), before);
}

#[test]
fn a_plan_that_has_to_wait_for_a_busy_model_says_so() {
    let mut world = three_of(40, 9);
    world.request(0);
    world.settle();
    let sizes = |_| Ok(Estimate { weights: Bytes(40), ..Estimate::default() });
    let plans = world.scheduler.plan(&[SlotId(1)], &sizes, world.now);
    assert!(!plans[0].fits && plans[0].refuse.is_none());
}

#[test]
fn who_would_be_evicted_gets_a_shorter_context_where_that_is_enough() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 50)]);
    used_once(&mut world, 0);
    let waiting = world.request(1);
    assert_eq!((world.phase(0), world.phase(1)), (Phase::Resizing, Phase::Waiting));
    assert!(world.loading.is_empty(), "its room is not there yet");
    world.finish_resize(0, false);
    assert_eq!(world.holds(0), 40, "half of its context is enough");
    world.finish_load(1);
    assert!(world.is_granted(waiting) && world.unloading.is_empty());
    let shortened = world.request(0);
    assert!(world.is_granted(shortened), "it answers with the shorter context");
}

#[test]
fn a_context_becomes_only_as_short_as_needed_and_its_model_is_evicted_where_that_is_not_enough() {
    let models = || vec![llm("a", 60).context(40), llm("b", 70), llm("c", 80), llm("d", 61)];
    for (other, leaves) in [(1, Some(30)), (2, None), (3, Some(30))] {
        let mut world = World::new(limits(100, 3), models());
        used_once(&mut world, 0);
        world.request(other);
        let becomes = (!world.resizing.is_empty()).then(|| {
            world.finish_resize(0, false);
            world.holds(0)
        });
        assert_eq!(becomes, leaves, "{other}");
        assert_eq!(world.unloading.is_empty(), leaves.is_some());
    }
}

#[test]
fn of_two_victims_one_may_only_have_to_get_shorter() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40), llm("b", 60).context(40), llm("c", 80)]);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    world.request(2);
    assert_eq!((world.phase(0), world.phase(1)), (Phase::Unloading, Phase::Unloading), "20 is too little");
    let mut world = World::new(limits(100, 3), vec![llm("a", 40), llm("b", 60).context(40), llm("c", 65)]);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    world.request(2);
    assert_eq!((world.phase(0), world.phase(1)), (Phase::Unloading, Phase::Resizing));
}

#[test]
fn a_shorter_context_frees_no_place_among_the_llms() {
    let mut world = World::new(limits(100, 1), vec![llm("a", 40).context(40), llm("b", 70)]);
    used_once(&mut world, 0);
    world.request(1);
    assert_eq!(world.phase(0), Phase::Unloading);
}

#[test]
fn a_pinned_models_context_stays() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 50)]);
    used_once(&mut world, 0);
    world.pin(0, true);
    world.request(1);
    assert_eq!(world.phase(0), Phase::Ready);
}

#[test]
fn a_context_is_whole_again_when_there_is_room_and_not_at_once() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 50)]);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    assert_eq!(world.holds(0), 40);
    world.unload(1);
    world.settle();
    let soon = world.request(0);
    assert!(world.is_granted(soon), "without a change so soon");
    world.give_back(soon);
    world.pass(Duration::from_secs(60));
    let later = world.request(0);
    assert_eq!((world.phase(0), world.holds(0)), (Phase::Resizing, 60), "its room is taken at once");
    world.finish_resize(0, false);
    assert!(world.is_granted(later));
    // Someone who needs the room has it first.
    world.give_back(later);
    used_once(&mut world, 1);
    world.pass(Duration::from_secs(60));
    let third = world.request(0);
    assert!(world.is_granted(third), "there is no room for more");
}

#[test]
fn an_engine_that_cannot_make_its_other_context_is_unloaded_and_its_memory_comes_back() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 50)]);
    used_once(&mut world, 0);
    let waiting = world.request(1);
    world.finish_resize(0, true);
    assert_eq!(world.phase(0), Phase::Unloading);
    world.settle();
    assert!(world.is_granted(waiting));
    let refused = world.request(0);
    assert!(matches!(world.rejection(refused), Some(Error::LoadBackoff { .. })));
}

#[test]
fn an_unload_that_is_asked_for_during_a_change_of_context_follows_it() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 50)]);
    used_once(&mut world, 0);
    world.request(1);
    world.unload(0);
    assert!(world.unload_results.is_empty());
    world.finish_resize(0, false);
    world.settle();
    assert_eq!(world.unload_results.len(), 1);
    assert_eq!(world.holds(0), 0);
}

#[test]
fn what_a_resized_model_really_holds_is_what_counts() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 50)]);
    used_once(&mut world, 0);
    world.request(1);
    let measured = Footprint { file_backed: Bytes(20), anonymous: Some(Bytes(25)), exact: true };
    world.resizing.clear();
    world.scheduler.handle(Event::Resized { slot: SlotId(0), result: Ok(Some(measured)) }, world.now);
    let status = world.scheduler.status(world.now);
    assert_eq!((status.slots[0].reserved, status.slots[0].measured), (Bytes(45), Some(measured)));
}

#[test]
fn what_other_processes_have_is_not_this_ones() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40), llm("b", 40), llm("c", 40)]);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    world.others(30);
    assert_eq!(
        (world.phase(0), world.phase(1)),
        (Phase::Unloading, Phase::Ready),
        "the oldest goes for them"
    );
    world.settle();
    world.others(60);
    let waiting = world.request(2);
    assert_eq!(world.phase(1), Phase::Unloading);
    world.settle();
    assert!(world.is_granted(waiting));
}

#[test]
fn what_a_load_lacks_after_all_that_is_idle_here_is_wanted_of_others() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 30), llm("b", 70), llm("c", 60)]);
    used_once(&mut world, 0);
    world.others(50);
    let first = world.request(1);
    assert_eq!((world.phase(1), world.scheduler.wanted()), (Phase::Waiting, Bytes(40)));
    world.request(2);
    assert_eq!(world.scheduler.wanted(), Bytes(40), "the first speaks");
    world.give_back(first);
    assert_eq!(world.scheduler.wanted(), Bytes(30));
    let mut alone = World::new(limits(100, 3), vec![llm("a", 40), llm("b", 70)]);
    used_once(&mut alone, 0);
    alone.request(1);
    assert_eq!((alone.phase(0), alone.scheduler.wanted()), (Phase::Unloading, Bytes::ZERO));
}

#[test]
fn a_load_whose_room_was_taken_by_another_process_waits_and_loads_later() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60)]);
    world.really = 70;
    let waiting = world.request(0);
    assert_eq!((world.phase(0), world.held(), world.loading.len()), (Phase::Waiting, 0, 0));
    world.others(0);
    world.settle();
    assert!(world.is_granted(waiting));
}

#[test]
fn a_context_whose_room_was_taken_by_another_process_stays_as_it_is() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 50)]);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    world.unload(1);
    world.settle();
    world.pass(Duration::from_secs(60));
    world.really = 60;
    let request = world.request(0);
    assert!(world.is_granted(request), "with the shorter one");
    assert_eq!(world.holds(0), 40);
}

#[test]
fn two_models_that_push_each_other_out_are_left_to_their_users_for_as_long_as_they_loaded() {
    let mut world = World::new(
        Limits { eviction: Eviction::CostAware, ..limits(100, 3) },
        vec![llm("a", 60), llm("b", 70)],
    );
    let second = Duration::from_secs(1);
    let load = |world: &mut World, slot: usize| {
        let id = world.request(slot);
        world.settle_unloads();
        world.pass(second);
        world.settle();
        assert!(world.is_granted(id));
        world.give_back(id);
    };
    load(&mut world, 0);
    load(&mut world, 1);
    assert!(world.loaded.contains(&SlotId(1)), "a first load is not held back");
    load(&mut world, 0);
    // Loaded again a second after it had to leave, by a load of a second.
    let other = world.request(1);
    assert_eq!(world.phase(0), Phase::Ready);
    let own = world.request(0);
    assert!(world.is_granted(own));
    world.give_back(own);
    assert_eq!(world.scheduler.poll_timeout(), Some(world.now + second));
    world.pass(second);
    assert_eq!(world.phase(0), Phase::Unloading);
    world.settle();
    assert!(world.is_granted(other));
}

#[test]
fn pinned_models_outlast_a_machine_that_is_short_of_memory_and_a_smaller_budget() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40), llm("b", 40)]);
    used_once(&mut world, 0);
    used_once(&mut world, 1);
    world.pin(0, true);
    world.memory(10);
    assert_eq!((world.phase(0), world.phase(1)), (Phase::Ready, Phase::Unloading));
    world.settle();
    world.budget(20);
    assert_eq!(world.phase(0), Phase::Ready);
    let waiting = world.request(1);
    assert!(matches!(world.rejection(waiting), Some(Error::OverBudget { left: Bytes::ZERO, .. })));
}

#[test]
fn a_machine_with_a_little_less_than_its_last_reading_does_not_have_a_load_sized_again_and_again() {
    let limits = Limits { reserve: Bytes(160), ..limits(1000, 3) };
    let mut world = World::new(limits, vec![llm("a", 700), llm("b", 260)]);
    world.memory(1160);
    let used = world.request(0);
    world.settle();
    assert!(world.is_granted(used));
    // Less than a sixty-fourth less: the reading counts as the same, but b does not fit any more.
    world.memory(1145);
    world.machine_has = Some(1110);
    let waiting = world.request(1);
    assert_eq!(world.phase(1), Phase::Waiting);
    let offered = world.offered.len();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.offered.len(), offered);
    world.memory(1160);
    world.settle();
    assert!(world.is_granted(waiting));
}

#[test]
fn a_context_that_becomes_shorter_does_so_whatever_other_processes_have() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60).context(40), llm("b", 30)]);
    used_once(&mut world, 0);
    world.request(1);
    world.really = 20;
    // What is held is more than was written down, and together it is more than the budget: a load would be refused now.
    world.finish_load_taking(1, 45);
    assert_eq!(world.phase(0), Phase::Resizing);
    // A refusal that comes all the same is not for it.
    world.event(Event::Taken { slot: SlotId(0), taken: Bytes(20) });
    assert_eq!((world.phase(0), world.scheduler.status(world.now).used), (Phase::Resizing, Bytes(105)));
    world.finish_resize(0, false);
    assert_eq!((world.holds(0), world.scheduler.status(world.now).used.0), (40, world.held()));
}

#[test]
fn a_load_that_takes_nothing_is_not_kept_out_by_other_processes() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40), llm("remote", 0)]);
    let used = world.request(0);
    world.settle();
    world.really = 50;
    world.grow(0, 60);
    let remote = world.request(1);
    world.settle();
    assert!(world.is_granted(used) && world.is_granted(remote));
}

#[test]
fn a_load_that_takes_nothing_is_not_taken_back_while_others_hold_too_much() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40), llm("remote", 0)]);
    world.request(0);
    world.settle();
    let remote = world.request(1);
    world.grow(0, 120);
    world.finish_load(1);
    assert!(world.is_granted(remote) && world.unloading.is_empty());
}

#[test]
fn what_a_model_gains_after_its_load_is_held_and_made_good() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40), llm("b", 40)]);
    used_once(&mut world, 0);
    let used = world.request(1);
    world.settle();
    world.grow(1, 50);
    let settled = world.settled.last().unwrap();
    assert_eq!((settled.bytes, settled.used, settled.measured), (Bytes(50), Bytes(90), Some(measured(50))));
    world.grow(1, 70);
    assert_eq!((world.phase(0), world.changes.last().unwrap().cause), (Phase::Unloading, Cause::Budget));
    world.settle();
    world.give_back(used);
    // The same again, or less than is held for it, changes nothing.
    let settled = world.settled.len();
    world.grow(1, 70);
    assert_eq!(world.settled.len(), settled);
    world.grow(1, 10);
    assert_eq!(world.scheduler.status(world.now).used, Bytes(70));
}

#[test]
fn a_load_that_took_too_much_is_tried_again_after_a_while_and_with_a_shorter_context_at_once() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40).context(20)]);
    world.request(0);
    world.finish_load_taking(0, 130);
    world.settle();
    let soon = world.request(0);
    assert!(matches!(world.rejection(soon), Some(Error::OverBudget { asked: Bytes(130), .. })));
    let shorter = |world: &mut World| {
        let id = world.request_unsized(0);
        let estimate =
            Estimate { weights: Bytes(20), kv: Bytes(10), n_ctx: Some(4000), ..Estimate::default() };
        let left = Bytes(100);
        world.event(Event::Estimated { slot: SlotId(0), left, short: false, result: Ok(estimate) });
        id
    };
    let short = shorter(&mut world);
    world.settle();
    assert!(world.is_granted(short));
    world.give_back(short);
    world.unload(0);
    world.settle();
    // What the shorter one took says nothing against the longer one's figure; time does.
    let mut world = World::new(limits(100, 3), vec![llm("a", 40)]);
    world.request(0);
    world.finish_load_taking(0, 130);
    world.settle();
    world.pass(Duration::from_mins(10));
    let later = world.request(0);
    world.settle();
    assert!(world.is_granted(later));
}

#[test]
fn what_is_not_measured_as_its_own_is_held_and_not_held_against_the_next_load() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 40)]);
    let first = world.request(0);
    let shared = Footprint { exact: false, ..measured(60) };
    world.loading.clear();
    world.loaded.insert(SlotId(0));
    world.event(Event::Loaded { slot: SlotId(0), result: Ok(Some(shared)) });
    assert_eq!(world.scheduler.status(world.now).used, Bytes(60));
    world.give_back(first);
    world.unload(0);
    world.settle();
    world.request(0);
    assert_eq!(world.holds(0), 40);
}

#[test]
fn a_model_is_not_evicted_while_it_loads_nor_between_its_load_and_its_first_request() {
    let mut world = three_of(80, 9);
    used_once(&mut world, 1);
    let first = world.request(0);
    let third = world.request(2);
    assert_eq!((world.phase(0), world.unloading.as_slice()), (Phase::Loading, [SlotId(1)].as_slice()));
    let fourth = world.request(3);
    assert_eq!(world.unloading.len(), 1, "what loads is no victim");
    // Its first request is there when it is ready, also after a tick and a reading.
    world.finish_load(0);
    world.pass(Duration::from_secs(1));
    world.memory(10);
    assert!(world.is_granted(first) && world.phase(0) == Phase::Ready);
    world.memory(1000);
    world.settle();
    assert!(world.is_granted(third) && !world.is_granted(fourth));
}

#[test]
fn a_request_that_comes_between_the_choice_of_a_victim_and_its_end_is_served_as_is_the_other() {
    let mut world = three_of(40, 9);
    used_once(&mut world, 0);
    let other = world.request(1);
    assert_eq!(world.unloading, [SlotId(0)]);
    let late = world.request(0);
    world.settle();
    assert!(world.is_granted(other) && !world.is_granted(late));
    world.give_back(other);
    world.settle();
    assert!(world.is_granted(late));
}

#[test]
fn a_request_that_wants_another_context_waits_no_longer_than_until_others_give_way() {
    // Both on one file: the second place needs the room that the first one has, under continuous load.
    let mut world = World::new(limits(60, 9), vec![llm("short", 40), llm("long", 60)]);
    let mut user = world.request(0);
    world.settle();
    let other = world.request(1);
    let asked = world.now;
    while !world.is_granted(other) {
        let next = world.request(0);
        world.pass(Duration::from_secs(1));
        world.give_back(user);
        user = next;
        world.settle();
        assert!(
            world.now.since(asked) < Duration::from_secs(8),
            "drained after 5 s, and then a request to end"
        );
    }
}

#[test]
fn a_new_budget_keeps_as_much_spare_as_is_its_part() {
    let limits = Limits { spare: Bytes(1), ..limits(6400, 3) }.with_spare();
    assert_eq!(limits.spare, Bytes(100));
    let mut world = World::new(limits, vec![llm("a", 630), llm("b", 631)]);
    world.budget(640);
    assert_eq!(world.scheduler.limits().spare, Bytes(10));
    let fits = world.request(0);
    world.settle();
    assert!(world.is_granted(fits));
    let over = world.request(1);
    assert!(matches!(world.rejection(over), Some(Error::OverBudget { left: Bytes(630), .. })));
    let mut none = World::new(super::world::limits(6400, 3), vec![llm("a", 640)]);
    none.budget(640);
    assert_eq!(none.scheduler.limits().spare, Bytes::ZERO, "who keeps none keeps none");
}

#[test]
fn who_is_chosen_to_give_memory_back_is_told_with_what_decided_it() {
    let mut world = World::new(limits(100, 3), vec![llm("a", 60), llm("b", 50)]);
    let id = world.request(0);
    world.pass(Duration::from_secs(3));
    world.settle();
    world.give_back(id);
    world.pass(Duration::from_secs(6));
    world.request(1);
    let chosen = world.chosen.last().unwrap();
    assert_eq!((chosen.model.as_str(), chosen.cause, chosen.bytes.0), ("a", Cause::Evicted, 60));
    assert_eq!((chosen.idle.as_secs(), chosen.load.as_secs(), chosen.uses), (6, 3, 1.0));
    assert_eq!((chosen.score, chosen.used.0, chosen.limit.0), (6.0 * 60.0 / 3.0, 60, 100));
    world.settle();
    let causes = |world: &World| world.chosen.iter().map(|chosen| chosen.cause).collect::<Vec<_>>();
    world.give_back(sarai_core::scheduler::RequestId(2));
    world.others(60);
    assert_eq!(causes(&world), [Cause::Evicted, Cause::Others]);
    world.settle();
    world.others(0);
    used_once(&mut world, 0);
    world.unload(0);
    world.settle();
    assert_eq!(world.chosen.len(), 2, "who is asked to unload was not chosen");
}

#[test]
fn a_plan_knows_of_failed_loads_of_models_that_stay_and_of_the_time_that_evictions_take() {
    let mut world = three_of(80, 9);
    let sizes = |_| Ok(Estimate { weights: Bytes(40), ..Estimate::default() });
    let plan = |world: &World, slot| world.scheduler.plan(&[SlotId(slot)], &sizes, world.now).remove(0);
    world.request(0);
    world.fail_load(0, FailureKind::Engine);
    assert!(matches!(plan(&world, 0).refuse, Some(Error::LoadBackoff { .. })));
    used_once(&mut world, 1);
    used_once(&mut world, 2);
    assert_eq!(plan(&world, 3).freeing, None, "nobody has been unloaded yet");
    let third = world.request(3);
    world.pass(Duration::from_secs(2));
    world.settle();
    world.give_back(third);
    assert_eq!(world.loaded(), [2, 3]);
    used_once(&mut world, 1);
    assert_eq!(world.loaded(), [1, 3]);
    world.pass(Duration::from_secs(1));
    used_once(&mut world, 3);
    let plan = plan(&world, 2);
    assert_eq!((plan.evict.len(), plan.freeing), (1, Some(Duration::from_secs(2))), "{plan:?}");
}

//! Traces played on the scheduler: what a way of evicting costs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::time::Duration;

use sarai_core::config::Class;
use sarai_core::memory::Estimate;
use sarai_core::request::{Capabilities, Capability};
use sarai_core::scheduler::{Eviction, Limits, SlotId, SlotSpec};
use sarai_core::simulate::{Arrival, Simulated, SimulatedSlot, simulate};
use sarai_core::units::{Bytes, Timestamp};

const BUDGET: f64 = 6.0;

/// A model of so many GB whose load takes so many seconds for each.
fn model(name: usize, gb: f64, seconds_per_gb: f64) -> SimulatedSlot {
    SimulatedSlot {
        spec: SlotSpec {
            model: format!("m{name}").parse().unwrap(),
            llm: true,
            class: Class::OnDemand,
            capabilities: Capabilities::of(&[Capability::Generate]),
            parallel: 4,
            ttl: None,
        },
        estimate: Estimate { weights: Bytes::from_gb(gb), ..Estimate::default() },
        load: Duration::from_secs_f64(gb * seconds_per_gb),
        unload: Duration::from_millis(100),
    }
}

/// Eight models of 2 GB.
fn equal() -> Vec<SimulatedSlot> {
    (0..8).map(|n| model(n, 2.0, 0.2)).collect()
}

/// Eight models from 0.5 to 5 GB, every other one repacked at its load.
fn mixed() -> Vec<SimulatedSlot> {
    let sizes = [0.5, 4.0, 1.0, 5.0, 0.8, 3.0, 1.5, 2.0];
    sizes.into_iter().enumerate().map(|(n, gb)| model(n, gb, if n % 2 == 0 { 0.2 } else { 2.5 })).collect()
}

fn play(models: &[SimulatedSlot], order: &[usize], eviction: Eviction) -> Simulated {
    let limits = Limits {
        budget: Bytes::from_gb(BUDGET),
        max_concurrent_llms: 8,
        eviction,
        max_waiting: usize::MAX,
        ..Limits::default()
    };
    let arrival = |(n, slot): (usize, &usize)| Arrival {
        at: Timestamp::new(Duration::from_secs(20 * n as u64)),
        slot: SlotId(*slot),
        runs: Duration::from_secs(3),
    };
    let trace: Vec<Arrival> = order.iter().enumerate().map(arrival).collect();
    let result = simulate(limits, models, &trace, Duration::from_mins(5));
    assert_eq!((result.served, result.requests), (order.len(), order.len()), "{result:?}");
    assert!(result.peak_bytes <= Bytes::from_gb(BUDGET), "{result:?}");
    result
}

/// Knuth's MMIX generator.
fn numbers(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Requests of which the nth most wanted model gets 1/n^s. Which ones are most wanted depends on the seed.
fn zipf(n: usize, seed: u64, s: f64) -> Vec<usize> {
    let mut next = numbers(seed);
    let mut ranks: Vec<usize> = (0..8).collect();
    for at in (1..8).rev() {
        ranks.swap(at, (next() * (at + 1) as f64) as usize);
    }
    let weights: Vec<f64> = (1..=8).map(|rank| 1.0 / f64::from(rank).powf(s)).collect();
    let sum: f64 = weights.iter().sum();
    (0..n)
        .map(|_| {
            let mut left = next() * sum;
            let rank = weights.iter().position(|weight| {
                left -= weight;
                left <= 0.0
            });
            ranks[rank.unwrap_or(7)]
        })
        .collect()
}

/// Every trace by name.
fn traces() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("A B".to_owned(), [1, 3].repeat(200)),
        ("A B C".to_owned(), [1, 3, 5].repeat(150)),
        ("A B C D".to_owned(), [0, 1, 2, 3].repeat(100)),
        ("A A A B".to_owned(), [1, 1, 1, 3].repeat(100)),
        ("one and then others".to_owned(), [[1].repeat(100), [3, 5].repeat(100)].concat()),
        ("in phases".to_owned(), (0..8).flat_map(|phase| [phase, (phase + 1) % 8].repeat(30)).collect()),
    ];
    for seed in 0..10 {
        for s in [0.6, 1.0, 1.5] {
            all.push((format!("Zipf {s}, {seed}"), zipf(600, seed, s)));
        }
    }
    all
}

#[test]
fn evicting_by_cost_loads_no_longer_than_lru_on_any_trace_and_less_where_sizes_differ() {
    for (models, what, gain) in [(equal(), "equal", 0.96), (mixed(), "mixed", 0.97)] {
        let (mut by_cost, mut by_lru) = (0.0, 0.0);
        for (name, order) in traces() {
            let cost = play(&models, &order, Eviction::CostAware).load_seconds;
            let lru = play(&models, &order, Eviction::Lru).load_seconds;
            println!("{what} {name}: {cost:.0} s by cost, {lru:.0} s by LRU");
            assert!(cost <= 1.02 * lru, "{what} {name}: {cost:.0} s by cost, {lru:.0} s by LRU");
            by_cost += cost;
            by_lru += lru;
        }
        assert!(by_cost <= gain * by_lru, "{what}: {by_cost:.0} s by cost, {by_lru:.0} s by LRU");
    }
}

#[test]
fn two_users_of_two_models_that_do_not_fit_together_load_less_by_cost() {
    // 4 GB each, a second to load, asked in turns every 0.3 s.
    let models = [model(0, 4.0, 0.25), model(1, 4.0, 0.25)];
    let loads = |eviction| {
        let limits =
            Limits { budget: Bytes::from_gb(BUDGET), eviction, max_waiting: 1000, ..Limits::default() };
        let arrival = |n: u64| Arrival {
            at: Timestamp::new(Duration::from_millis(300 * n)),
            slot: SlotId(n as usize % 2),
            runs: Duration::from_millis(100),
        };
        let trace: Vec<Arrival> = (0..200).map(arrival).collect();
        let result = simulate(limits, &models, &trace, Duration::from_mins(5));
        assert_eq!(result.served, 200, "{result:?}");
        result.loads
    };
    let (by_cost, by_lru) = (loads(Eviction::CostAware), loads(Eviction::Lru));
    assert!(by_cost * 10 <= by_lru * 7, "{by_cost} loads by cost, {by_lru} by LRU");
}

#[test]
fn a_trace_counts_what_happens() {
    let models = [model(0, 4.0, 0.5), model(1, 4.0, 0.5)];
    let result = play(&models, &[0, 0, 1, 0], Eviction::Lru);
    assert_eq!((result.misses, result.loads, result.evictions), (3, 3, 2));
    assert_eq!((result.load_seconds, result.bytes_loaded), (6.0, Bytes::from_gb(12.0)));
    assert_eq!(result.wait_p50_seconds, 2.0);
    // An unload before the load.
    assert_eq!(result.wait_p99_seconds, 2.1);
}

#[test]
fn what_can_never_fit_and_what_waits_too_long_is_said() {
    let models = [model(0, 9.0, 0.1), model(1, 4.0, 100.0)];
    let limits = Limits { budget: Bytes::from_gb(BUDGET), ..Limits::default() };
    let arrival = |slot| Arrival { at: Timestamp::default(), slot: SlotId(slot), runs: Duration::ZERO };
    let result = simulate(limits, &models, &[arrival(0), arrival(1)], Duration::from_mins(5));
    assert_eq!(result.served, 0);
    let refused: Vec<_> = result.refused.iter().map(|(why, n)| (why.as_str(), *n)).collect();
    assert_eq!(refused, [("over budget", 1), ("waited too long", 1)]);
}

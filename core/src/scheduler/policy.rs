use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::SlotId;
use crate::config::Class;
use crate::memory::{Claim, WeightsId};
use crate::units::{Bytes, ModelName};

/// Who is evicted first, within a class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Eviction {
    /// Whose absence costs least for what it frees: long idle, large, quick to load again, seldom used.
    #[default]
    CostAware,
    /// The least recently used.
    Lru,
}

/// A slot that may be evicted: ready, idle and not pinned.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The slot.
    pub slot: SlotId,
    /// Its model, if evicting all of that model's slots frees a place among the LLMs.
    pub llm: Option<ModelName>,
    /// How hard to hold on to it.
    pub class: Class,
    /// What it holds: what only it has is free when it goes, its weights when the last who share them go.
    pub claim: Claim,
    /// How long it has been idle.
    pub idle: Duration,
    /// How long its last load took.
    pub reload: Duration,
    /// How often it was used of late: its uses, each counting half as much for every [`HALF_LIFE`] uses of any model since.
    pub uses: f64,
}

/// See [`Candidate::uses`]. In requests and not in time, so that it suits slow and busy days. Longer, and what was wanted
/// before the last change of subject counts too much; shorter, and only the last request counts.
pub const HALF_LIFE: f64 = 8.0;

/// No load is quicker than this, for a model on a host neither.
const QUICKEST: Duration = Duration::from_millis(1);

impl Candidate {
    /// How little it costs to be without it: idle time × what it frees ÷ (time to load it again × uses). Where only a place
    /// among the LLMs is needed, what it frees is the same for all.
    #[must_use]
    pub fn worth(&self, bytes_needed: bool) -> f64 {
        let frees = if bytes_needed { self.claim.total().0 as f64 } else { 1.0 };
        let idle = self.idle.max(QUICKEST).as_secs_f64();
        idle * frees / (self.reload.max(QUICKEST).as_secs_f64() * self.uses.max(f64::MIN_POSITIVE))
    }
}

/// Who holds what several slots may hold together, those on their way out excepted.
#[derive(Clone, Debug, Default)]
pub struct Together {
    /// The slots of each LLM that hold anything: its place is free when the last one goes.
    pub llms: BTreeMap<ModelName, usize>,
    /// The slots that hold each weights.
    pub weights: BTreeMap<WeightsId, usize>,
}

/// What an eviction has to free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Bytes.
    pub bytes: Bytes,
    /// Places among the LLMs.
    pub llms: usize,
}

/// What an eviction would take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The slots to evict.
    pub victims: Vec<SlotId>,
    /// Whether they free what is needed.
    pub sufficient: bool,
}

/// Chooses whom to evict: the lowest class first, within it by `eviction`, and of these no more than needed.
///
/// A pure function: the same arguments always give the same choice, in whatever order the candidates come.
#[must_use]
pub fn choose(candidates: &[Candidate], held: &Together, need: Need, eviction: Eviction) -> Choice {
    let mut order: Vec<&Candidate> = candidates.iter().collect();
    order.sort_by(|a, b| {
        let first = match eviction {
            Eviction::CostAware => {
                let bytes = need.bytes > Bytes::ZERO;
                b.worth(bytes).total_cmp(&a.worth(bytes))
            }
            Eviction::Lru => Ordering::Equal,
        };
        let lru = || b.idle.cmp(&a.idle).then_with(|| a.slot.cmp(&b.slot));
        a.class.cmp(&b.class).then(first).then_with(lru)
    });
    let mut chosen: Vec<&Candidate> = Vec::new();
    for candidate in order {
        if frees(&chosen, held, need) {
            break;
        }
        chosen.push(candidate);
    }
    let sufficient = frees(&chosen, held, need);
    if sufficient {
        // The most valuable first: whoever turns out not to be needed stays.
        for at in (0..chosen.len()).rev() {
            let spared = chosen.remove(at);
            if !frees(&chosen, held, need) {
                chosen.insert(at, spared);
            }
        }
    }
    Choice { victims: chosen.iter().map(|candidate| candidate.slot).collect(), sufficient }
}

fn frees(chosen: &[&Candidate], held: &Together, need: Need) -> bool {
    let own: Bytes = chosen.iter().map(|candidate| candidate.claim.own).sum();
    let weights = chosen.iter().filter_map(|candidate| candidate.claim.weights.as_ref());
    let sizes: BTreeMap<&WeightsId, Bytes> = weights.clone().map(|(id, bytes)| (id, *bytes)).collect();
    let shared: Bytes = all_go(weights.map(|(id, _)| id), &held.weights)
        .into_iter()
        .filter_map(|id| sizes.get(id))
        .copied()
        .sum();
    let llms = all_go(chosen.iter().filter_map(|candidate| candidate.llm.as_ref()), &held.llms).len();
    own + shared >= need.bytes && llms >= need.llms
}

/// What goes with `leaving`, of things that are held together: those whose last holder is among them.
fn all_go<'k, K: Ord>(leaving: impl Iterator<Item = &'k K>, held: &BTreeMap<K, usize>) -> Vec<&'k K> {
    let mut counts: BTreeMap<&K, usize> = BTreeMap::new();
    for key in leaving {
        *counts.entry(key).or_default() += 1;
    }
    let last = |(key, count): &(&K, usize)| held.get(*key).is_none_or(|held| count >= held);
    counts.into_iter().filter(last).map(|(key, _)| key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(slot: usize, class: Class, bytes: u64, idle: u64) -> Candidate {
        let llm = Some(format!("m{slot}").parse().unwrap());
        let claim = Bytes(bytes).into();
        let (idle, reload) = (Duration::from_secs(idle), Duration::from_secs(1));
        Candidate { slot: SlotId(slot), llm, class, claim, idle, reload, uses: 1.0 }
    }

    fn victims(candidates: &[Candidate], bytes: u64, llms: usize) -> Option<Vec<usize>> {
        let all = candidates.iter().filter_map(|c| c.llm.clone()).map(|model| (model, 1)).collect();
        let held = Together { llms: all, ..Together::default() };
        let choice = choose(candidates, &held, Need { bytes: Bytes(bytes), llms }, Eviction::Lru);
        choice.sufficient.then(|| choice.victims.iter().map(|slot| slot.0).collect())
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let all = [10, 30, 20].map(|idle| candidate(idle as usize, Class::OnDemand, 5, idle));
        assert_eq!(victims(&all, 1, 0), Some(vec![30]));
        assert_eq!(victims(&all, 10, 0), Some(vec![30, 20]));
        assert_eq!(victims(&all, 16, 0), None);
        assert_eq!(victims(&all, 0, 0), Some(vec![]));
    }

    #[test]
    fn a_preferred_model_goes_after_all_others() {
        let all = [
            candidate(0, Class::Preferred, 5, 100),
            candidate(1, Class::OnDemand, 5, 10),
            candidate(2, Class::Ephemeral, 5, 1),
        ];
        assert_eq!(victims(&all, 6, 0), Some(vec![2, 1]));
    }

    #[test]
    fn small_ones_stay_when_a_larger_one_suffices_alone() {
        let all = [candidate(0, Class::OnDemand, 1, 30), candidate(1, Class::OnDemand, 10, 20)];
        assert_eq!(victims(&all, 10, 0), Some(vec![1]));
    }

    #[test]
    fn a_place_among_the_llms_is_free_when_all_slots_of_a_model_go() {
        let model: ModelName = "solar".parse().unwrap();
        let both = [0, 1]
            .map(|slot| Candidate { llm: Some(model.clone()), ..candidate(slot, Class::OnDemand, 0, 9) });
        let held = Together { llms: BTreeMap::from([(model, 2)]), ..Together::default() };
        let need = Need { bytes: Bytes::ZERO, llms: 1 };
        assert!(!choose(&both[..1], &held, need, Eviction::Lru).sufficient);
        assert_eq!(choose(&both, &held, need, Eviction::Lru).victims, [SlotId(0), SlotId(1)]);
    }

    #[test]
    fn shared_weights_are_free_when_all_who_hold_them_go() {
        let id = WeightsId::new("file");
        let sharing = |slot, idle| Candidate {
            claim: Claim { own: Bytes(1), weights: Some((id.clone(), Bytes(50))) },
            ..candidate(slot, Class::OnDemand, 0, idle)
        };
        let all = [sharing(0, 30), sharing(1, 20), candidate(2, Class::OnDemand, 60, 10)];
        let held = Together { weights: BTreeMap::from([(id.clone(), 2)]), ..Together::default() };
        let need = |bytes| Need { bytes: Bytes(bytes), llms: 0 };
        let victims = |bytes| choose(&all, &held, need(bytes), Eviction::Lru).victims;
        assert_eq!(victims(1), [SlotId(0)]);
        assert_eq!(victims(40), [SlotId(0), SlotId(1)]);
        assert_eq!(victims(55), [SlotId(2)], "one alone is the smaller set");
    }

    #[test]
    fn by_cost_the_one_goes_whose_absence_costs_least_for_what_it_frees() {
        let victim = |a: Candidate, b: Candidate, need| {
            let choice = choose(&[a, b], &Together::default(), need, Eviction::CostAware);
            choice.victims[0].0
        };
        let bytes = Need { bytes: Bytes(1), llms: 0 };
        let one = |slot| candidate(slot, Class::OnDemand, 10, 60);
        let secs = Duration::from_secs;
        assert_eq!(victim(one(0), Candidate { reload: secs(9), ..one(1) }, bytes), 0, "quick to load again");
        assert_eq!(victim(one(0), Candidate { uses: 0.5, ..one(1) }, bytes), 1, "seldom used");
        assert_eq!(victim(one(0), Candidate { idle: secs(90), ..one(1) }, bytes), 1, "long idle");
        assert_eq!(victim(candidate(0, Class::OnDemand, 90, 60), one(1), bytes), 0, "large");
        let preferred = Candidate { class: Class::Preferred, idle: secs(900), ..one(1) };
        assert_eq!(victim(one(0), preferred, bytes), 0, "classes come first");
        // A model on a host frees no bytes, but its place at next to no cost.
        let remote = Candidate { claim: Bytes::ZERO.into(), reload: Duration::ZERO, idle: secs(1), ..one(1) };
        let all = Together {
            llms: BTreeMap::from([("m0".parse().unwrap(), 1), ("m1".parse().unwrap(), 1)]),
            ..Together::default()
        };
        let place = Need { bytes: Bytes::ZERO, llms: 1 };
        assert_eq!(choose(&[one(0), remote], &all, place, Eviction::CostAware).victims, [SlotId(1)]);
    }

    #[test]
    fn helpers_are_not_evicted_for_a_place_among_the_llms() {
        let helper = Candidate { llm: None, ..candidate(0, Class::OnDemand, 5, 99) };
        assert_eq!(victims(&[helper, candidate(1, Class::OnDemand, 5, 1)], 0, 1), Some(vec![1]));
    }
}

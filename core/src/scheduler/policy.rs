use std::collections::BTreeMap;
use std::time::Duration;

use super::SlotId;
use crate::config::Class;
use crate::units::{Bytes, ModelName};

/// A slot that may be evicted: ready, idle and not pinned.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The slot.
    pub slot: SlotId,
    /// Its model, if evicting all of that model's slots frees a place among the LLMs.
    pub llm: Option<ModelName>,
    /// How hard to hold on to it.
    pub class: Class,
    /// What it would free.
    pub bytes: Bytes,
    /// How long it has been idle.
    pub idle: Duration,
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

/// Chooses whom to evict: the lowest class first, within it the least recently used, and of these no more than
/// needed. `held` counts the slots of each LLM that hold anything: an LLM's place is free when the last one goes.
///
/// A pure function: the same arguments always give the same choice, in whatever order the candidates come.
#[must_use]
pub fn choose(candidates: &[Candidate], held: &BTreeMap<ModelName, usize>, need: Need) -> Choice {
    let mut order: Vec<&Candidate> = candidates.iter().collect();
    order.sort_by(|a, b| {
        a.class.cmp(&b.class).then_with(|| b.idle.cmp(&a.idle)).then_with(|| a.slot.cmp(&b.slot))
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

fn frees(chosen: &[&Candidate], held: &BTreeMap<ModelName, usize>, need: Need) -> bool {
    let bytes: Bytes = chosen.iter().map(|candidate| candidate.bytes).sum();
    let mut leaving: BTreeMap<&ModelName, usize> = BTreeMap::new();
    for model in chosen.iter().filter_map(|candidate| candidate.llm.as_ref()) {
        *leaving.entry(model).or_default() += 1;
    }
    let llms =
        leaving.iter().filter(|(model, count)| held.get(**model).is_none_or(|held| *count >= held)).count();
    bytes >= need.bytes && llms >= need.llms
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(slot: usize, class: Class, bytes: u64, idle: u64) -> Candidate {
        let llm = Some(format!("m{slot}").parse().unwrap());
        Candidate { slot: SlotId(slot), llm, class, bytes: Bytes(bytes), idle: Duration::from_secs(idle) }
    }

    fn victims(candidates: &[Candidate], bytes: u64, llms: usize) -> Option<Vec<usize>> {
        let held = candidates.iter().filter_map(|c| c.llm.clone()).map(|model| (model, 1)).collect();
        let choice = choose(candidates, &held, Need { bytes: Bytes(bytes), llms });
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
        let held = BTreeMap::from([(model, 2)]);
        let need = Need { bytes: Bytes::ZERO, llms: 1 };
        assert!(!choose(&both[..1], &held, need).sufficient);
        assert_eq!(choose(&both, &held, need).victims, [SlotId(0), SlotId(1)]);
    }

    #[test]
    fn helpers_are_not_evicted_for_a_place_among_the_llms() {
        let helper = Candidate { llm: None, ..candidate(0, Class::OnDemand, 5, 99) };
        assert_eq!(victims(&[helper, candidate(1, Class::OnDemand, 5, 1)], 0, 1), Some(vec![1]));
    }
}

//! What a host holds, and who has to leave when that is too much. Pure: what the host says comes in with each look.

use std::collections::{BTreeMap, BTreeSet};

use sarai_core::units::Bytes;

use super::wire::HostModel;

/// The models of a host, as they were seen so far. Only what is listed counts: a host says neither who is busy nor when each
/// was used, but the time at which it will drop a model moves with every use, whoever's it is.
#[derive(Debug, Default)]
pub(super) struct Seen {
    models: BTreeMap<String, Model>,
    looks: u64,
}

#[derive(Debug)]
struct Model {
    size: Bytes,
    expires_at: Option<String>,
    /// The first look that it was listed in.
    first: u64,
    /// The last look that found it used since the one before, or for the first time.
    used: u64,
}

/// What can be done about a host that holds too much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// Nothing has to be.
    Fits,
    /// This one leaves.
    Unload(String),
    /// Of some it is not known yet whether they are idle: look again.
    LookAgain,
    /// All that are left are in use or kept.
    Full,
}

impl Seen {
    /// Takes in what the host lists.
    pub(super) fn look(&mut self, listed: &[HostModel]) {
        self.looks += 1;
        let looks = self.looks;
        let names: BTreeSet<&str> = listed.iter().map(|model| model.name.as_str()).collect();
        self.models.retain(|name, _| names.contains(name.as_str()));
        for HostModel { name, size, expires_at, .. } in listed {
            let new =
                || Model { size: Bytes::ZERO, expires_at: expires_at.clone(), first: looks, used: looks };
            let model = self.models.entry(name.clone()).or_insert_with(new);
            model.size = Bytes(*size);
            if model.expires_at != *expires_at {
                model.expires_at.clone_from(expires_at);
                model.used = looks;
            }
        }
    }

    /// What they take together.
    pub(super) fn held(&self) -> Bytes {
        self.models.values().map(|model| model.size).sum()
    }

    pub(super) fn holds(&self, name: &str) -> bool {
        self.models.contains_key(name)
    }

    /// What to do so that `more` fits below `limit`. Those in `kept` stay.
    pub(super) fn advice(&self, limit: Bytes, more: Bytes, kept: &BTreeSet<String>) -> Advice {
        if self.held() + more <= limit {
            return Advice::Fits;
        }
        let held_by_kept = self.models.iter().filter(|(name, _)| kept.contains(*name));
        if held_by_kept.map(|(_, model)| model.size).sum::<Bytes>() + more > limit {
            return Advice::Full;
        }
        let free = || self.models.iter().filter(|(name, _)| !kept.contains(*name));
        let idle = free().filter(|(_, model)| model.used < self.looks);
        let oldest = idle.min_by_key(|(name, model)| (model.used, model.expires_at.clone(), (*name).clone()));
        match oldest {
            Some((name, _)) => Advice::Unload(name.clone()),
            None if free().any(|(_, model)| model.first == self.looks) => Advice::LookAgain,
            None => Advice::Full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(models: &[(&str, u64, &str)]) -> Vec<HostModel> {
        let model = |(name, gb, expires): &(&str, u64, &str)| HostModel {
            name: (*name).to_owned(),
            size: gb * 1_000_000_000,
            size_vram: 0,
            expires_at: Some((*expires).to_owned()),
            context_length: None,
        };
        models.iter().map(model).collect()
    }

    const SIX: Bytes = Bytes(6_000_000_000);

    fn kept(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn below_the_limit_nobody_leaves() {
        let mut seen = Seen::default();
        seen.look(&listed(&[("a", 4, "10:00")]));
        assert_eq!(seen.advice(SIX, Bytes(2_000_000_000), &kept(&[])), Advice::Fits);
    }

    #[test]
    fn the_least_recently_used_leaves_and_what_others_use_is_known_by_its_expiry() {
        let mut seen = Seen::default();
        seen.look(&listed(&[("a", 3, "10:00"), ("b", 3, "10:00")]));
        seen.look(&listed(&[("a", 3, "10:01"), ("b", 3, "10:00"), ("c", 3, "10:05")]));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&[])), Advice::Unload("b".into()));
        seen.look(&listed(&[("a", 3, "10:01"), ("b", 3, "10:03"), ("c", 3, "10:05")]));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&[])), Advice::Unload("a".into()));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&["a"])), Advice::Unload("c".into()));
    }

    #[test]
    fn a_model_that_was_never_seen_before_is_looked_at_twice() {
        let mut seen = Seen::default();
        seen.look(&listed(&[("a", 9, "10:00")]));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&[])), Advice::LookAgain);
        seen.look(&listed(&[("a", 9, "10:00")]));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&[])), Advice::Unload("a".into()));
    }

    #[test]
    fn with_all_in_use_or_kept_the_host_is_full() {
        let mut seen = Seen::default();
        seen.look(&listed(&[("a", 5, "10:00"), ("b", 5, "10:00")]));
        seen.look(&listed(&[("a", 5, "10:01"), ("b", 5, "10:00")]));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&["b"])), Advice::Full);
    }

    #[test]
    fn for_what_can_never_fit_nobody_leaves() {
        let mut seen = Seen::default();
        seen.look(&listed(&[("a", 3, "10:00")]));
        seen.look(&listed(&[("a", 3, "10:00")]));
        assert_eq!(seen.advice(SIX, Bytes(7_000_000_000), &kept(&[])), Advice::Full);
        assert_eq!(seen.advice(SIX, Bytes(4_000_000_000), &kept(&["a"])), Advice::Full);
    }

    #[test]
    fn a_clock_that_jumps_back_looks_like_a_use_and_no_more() {
        let mut seen = Seen::default();
        seen.look(&listed(&[("a", 9, "10:00")]));
        seen.look(&listed(&[("a", 9, "09:00")]));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&[])), Advice::Full);
        seen.look(&listed(&[("a", 9, "09:00")]));
        assert_eq!(seen.advice(SIX, Bytes::ZERO, &kept(&[])), Advice::Unload("a".into()));
    }
}

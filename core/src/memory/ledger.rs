use std::collections::{BTreeMap, BTreeSet};

use super::{Estimate, WeightsId};
use crate::error::Holder;
use crate::units::{Bytes, ModelName};

/// Who holds how much of the budget. Plain arithmetic: it measures nothing and asks nobody.
///
/// An entry lives from before a load starts until the memory is really back, so the sum of the entries is an upper
/// bound of what models hold, also while loads and unloads overlap.
#[derive(Debug)]
pub struct Ledger {
    budget: Bytes,
    ceiling: Option<Bytes>,
    others: Bytes,
    spare: Bytes,
    used: Bytes,
    peak: Bytes,
    next: u64,
    entries: BTreeMap<u64, Entry>,
    weights: BTreeMap<WeightsId, Weights>,
}

#[derive(Clone, Debug)]
struct Entry {
    model: ModelName,
    /// Shared weights excepted.
    own: Bytes,
    weights: Option<WeightsId>,
}

/// Weights that several entries may share.
#[derive(Clone, Copy, Debug)]
struct Weights {
    bytes: Bytes,
    entries: usize,
}

/// What a load asks the ledger for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// What only this load has.
    pub own: Bytes,
    /// Weights that count once for all who hold them.
    pub weights: Option<(WeightsId, Bytes)>,
}

impl Claim {
    /// All together, as if nobody shared the weights.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.own + self.weights.as_ref().map_or(Bytes::ZERO, |(_, bytes)| *bytes)
    }
}

impl From<Bytes> for Claim {
    fn from(own: Bytes) -> Self {
        Self { own, weights: None }
    }
}

impl From<&Estimate> for Claim {
    fn from(estimate: &Estimate) -> Self {
        let weights = estimate.weights_id.clone().map(|id| (id, estimate.weights));
        let shared = weights.as_ref().map_or(Bytes::ZERO, |(_, bytes)| *bytes);
        Self { own: estimate.at_load().saturating_sub(shared), weights }
    }
}

/// A part of the budget, given out by [`Ledger::try_reserve`] and nobody else. Whoever has it may load; it goes back
/// through [`Ledger::release`].
#[derive(Debug)]
#[must_use = "bytes stay used until the reservation is released"]
pub struct Reservation {
    id: u64,
}

/// A reservation did not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// What was asked for.
    pub asked: Bytes,
    /// What was left.
    pub left: Bytes,
}

impl Ledger {
    /// An empty ledger over `budget`.
    #[must_use]
    pub fn new(budget: Bytes) -> Self {
        Self {
            budget,
            ceiling: None,
            others: Bytes::ZERO,
            spare: Bytes::ZERO,
            used: Bytes::ZERO,
            peak: Bytes::ZERO,
            next: 0,
            entries: BTreeMap::new(),
            weights: BTreeMap::new(),
        }
    }

    /// What a claim takes now: its weights only where nobody holds them.
    #[must_use]
    pub fn needed(&self, claim: &Claim) -> Bytes {
        match &claim.weights {
            Some((id, _)) if self.weights.contains_key(id) => claim.own,
            Some(_) | None => claim.total(),
        }
    }

    /// Takes what a claim needs out of the budget for `model`.
    ///
    /// # Errors
    /// Less than that is left; nothing was taken.
    pub fn try_reserve(
        &mut self,
        model: &ModelName,
        claim: impl Into<Claim>,
    ) -> Result<Reservation, Shortfall> {
        let claim = claim.into();
        let asked = self.needed(&claim);
        if asked > self.left() {
            return Err(Shortfall { asked, left: self.left() });
        }
        Ok(self.enter(model.clone(), claim))
    }

    /// Takes an entry of another ledger over, whether or not it fits the budget.
    pub fn adopt(&mut self, other: &Self, reservation: &Reservation) -> Option<Reservation> {
        let Entry { model, own, weights } = other.entries.get(&reservation.id)?.clone();
        let weights = weights.and_then(|id| other.weights.get(&id).map(|weights| (id, weights.bytes)));
        Some(self.enter(model, Claim { own, weights }))
    }

    fn enter(&mut self, model: ModelName, Claim { own, weights }: Claim) -> Reservation {
        self.used += own;
        let weights = weights.map(|(id, bytes)| {
            let shared = self.weights.entry(id.clone()).or_insert(Weights { bytes, entries: 0 });
            if shared.entries == 0 {
                self.used += bytes;
            }
            shared.entries += 1;
            id
        });
        self.peak = self.peak.max(self.used);
        let id = self.next;
        self.next += 1;
        self.entries.insert(id, Entry { model, own, weights });
        Reservation { id }
    }

    /// Corrects an entry to what the model was found to hold, its weights included. This may exceed the budget: the
    /// memory is taken already, and the ledger says what is true.
    pub fn settle(&mut self, reservation: &Reservation, bytes: Bytes) {
        if let Some(entry) = self.entries.get_mut(&reservation.id) {
            let weights = entry.weights.as_ref().and_then(|id| self.weights.get(id));
            let own = bytes.saturating_sub(weights.map_or(Bytes::ZERO, |weights| weights.bytes));
            self.used = self.used - entry.own + own;
            entry.own = own;
            self.peak = self.peak.max(self.used);
        }
    }

    /// Gives an entry back, once its memory is really back. Returns the bytes that are free again.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "taking the token is the point: it cannot be used again"
    )]
    pub fn release(&mut self, reservation: Reservation) -> Bytes {
        let bytes = self.frees([&reservation]);
        if let Some(id) = self.entries.remove(&reservation.id).and_then(|entry| entry.weights)
            && let Some(weights) = self.weights.get_mut(&id)
        {
            weights.entries -= 1;
            if weights.entries == 0 {
                self.weights.remove(&id);
            }
        }
        self.used = self.used - bytes;
        bytes
    }

    /// What would be free if these entries were given back: weights only where nobody else holds them.
    pub fn frees<'r>(&self, reservations: impl IntoIterator<Item = &'r Reservation>) -> Bytes {
        let mut own = Bytes::ZERO;
        let mut leaving: BTreeMap<&WeightsId, usize> = BTreeMap::new();
        for entry in reservations.into_iter().filter_map(|reservation| self.entries.get(&reservation.id)) {
            own += entry.own;
            if let Some(id) = &entry.weights {
                *leaving.entry(id).or_default() += 1;
            }
        }
        let weights = leaving.into_iter().filter_map(|(id, leaving)| {
            self.weights.get(id).filter(|weights| weights.entries <= leaving).map(|weights| weights.bytes)
        });
        own + weights.sum()
    }

    /// What an entry holds, shared weights included.
    #[must_use]
    pub fn bytes(&self, reservation: &Reservation) -> Bytes {
        self.claim(reservation).total()
    }

    /// What an entry holds.
    #[must_use]
    pub fn claim(&self, reservation: &Reservation) -> Claim {
        let Some(entry) = self.entries.get(&reservation.id) else { return Claim::default() };
        let weights = entry.weights.as_ref();
        let weights = weights.and_then(|id| Some((id.clone(), self.weights.get(id)?.bytes)));
        Claim { own: entry.own, weights }
    }

    /// The budget.
    #[must_use]
    pub fn budget(&self) -> Bytes {
        self.budget
    }

    /// Changes the budget. Entries stay as they are, also where they exceed it now.
    pub fn set_budget(&mut self, budget: Bytes) {
        self.budget = budget;
    }

    /// Says how much the machine has memory for just now, which may be less than the budget. Entries stay as they are.
    pub fn set_ceiling(&mut self, ceiling: Option<Bytes>) {
        self.ceiling = ceiling;
    }

    /// What the machine has memory for just now, where that is less than the budget.
    #[must_use]
    pub fn ceiling(&self) -> Option<Bytes> {
        self.ceiling.filter(|ceiling| *ceiling < self.budget)
    }

    /// Says how much of the budget other processes have. Entries stay as they are.
    pub fn set_others(&mut self, others: Bytes) {
        self.others = others;
    }

    /// Says how much is never given out, for what the process holds besides the entries.
    pub fn set_spare(&mut self, spare: Bytes) {
        self.spare = spare;
    }

    /// How much is never given out.
    #[must_use]
    pub fn spare(&self) -> Bytes {
        self.spare
    }

    /// How much of the budget other processes have.
    #[must_use]
    pub fn others(&self) -> Bytes {
        self.others
    }

    /// What other processes leave of the budget.
    #[must_use]
    pub fn share(&self) -> Bytes {
        self.budget.saturating_sub(self.others)
    }

    /// What may be held just now: what other processes leave of the budget, or what the machine has memory for where that
    /// is less.
    #[must_use]
    pub fn limit(&self) -> Bytes {
        self.ceiling().map_or(self.share(), |ceiling| ceiling.min(self.share()))
    }

    /// The sum of all entries.
    #[must_use]
    pub fn used(&self) -> Bytes {
        self.used
    }

    /// The largest sum so far.
    #[must_use]
    pub fn peak(&self) -> Bytes {
        self.peak
    }

    /// What is left of the limit to give out; zero where the entries exceed it.
    #[must_use]
    pub fn left(&self) -> Bytes {
        self.limit().saturating_sub(self.used + self.spare)
    }

    /// Who holds how much, largest first; entries of one model are added up. Shared weights are the first holder's.
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        let mut by_model: BTreeMap<&ModelName, Bytes> = BTreeMap::new();
        let mut counted = BTreeSet::new();
        for entry in self.entries.values() {
            let weights = entry.weights.as_ref().filter(|id| counted.insert(*id));
            let weights =
                weights.and_then(|id| self.weights.get(id)).map_or(Bytes::ZERO, |weights| weights.bytes);
            *by_model.entry(&entry.model).or_default() += entry.own + weights;
        }
        let mut holders: Vec<Holder> = by_model
            .into_iter()
            .filter(|(_, bytes)| *bytes > Bytes::ZERO)
            .map(|(model, bytes)| Holder { model: model.clone(), bytes })
            .collect();
        holders.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.model.cmp(&b.model)));
        holders
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ModelName {
        name.parse().unwrap()
    }

    #[test]
    fn a_reservation_beyond_the_budget_is_refused_with_its_numbers() {
        let mut ledger = Ledger::new(Bytes(100));
        let held = ledger.try_reserve(&name("a"), Bytes(60)).unwrap();
        let shortfall = ledger.try_reserve(&name("b"), Bytes(50)).unwrap_err();
        assert_eq!(shortfall, Shortfall { asked: Bytes(50), left: Bytes(40) });
        assert_eq!(ledger.used(), Bytes(60));
        assert_eq!(ledger.release(held), Bytes(60));
        assert_eq!((ledger.used(), ledger.peak()), (Bytes::ZERO, Bytes(60)));
    }

    #[test]
    fn a_measured_figure_replaces_the_reserved_one() {
        let mut ledger = Ledger::new(Bytes(100));
        let held = ledger.try_reserve(&name("a"), Bytes(60)).unwrap();
        ledger.settle(&held, Bytes(130));
        assert_eq!((ledger.used(), ledger.left(), ledger.peak()), (Bytes(130), Bytes::ZERO, Bytes(130)));
        ledger.settle(&held, Bytes(20));
        assert_eq!((ledger.left(), ledger.bytes(&held)), (Bytes(80), Bytes(20)));
        assert_eq!(ledger.release(held), Bytes(20));
    }

    #[test]
    fn shared_weights_count_once_and_are_free_when_the_last_holder_goes() {
        let mut ledger = Ledger::new(Bytes(100));
        let claim = |own| Claim { own: Bytes(own), weights: Some((WeightsId::new("file"), Bytes(60))) };
        let first = ledger.try_reserve(&name("a"), claim(10)).unwrap();
        assert_eq!((ledger.used(), ledger.needed(&claim(20))), (Bytes(70), Bytes(20)));
        let second = ledger.try_reserve(&name("b"), claim(20)).unwrap();
        assert_eq!((ledger.used(), ledger.bytes(&second)), (Bytes(90), Bytes(80)));
        assert!(ledger.try_reserve(&name("c"), claim(11)).is_err());
        assert_eq!((ledger.frees([&first]), ledger.frees([&first, &second])), (Bytes(10), Bytes(90)));
        // Measured with its weights, of which the ledger knows.
        ledger.settle(&second, Bytes(85));
        assert_eq!(ledger.used(), Bytes(95));
        let mut copy = Ledger::new(Bytes(1));
        let copied = [&first, &second].map(|entry| copy.adopt(&ledger, entry).unwrap());
        assert_eq!((copy.used(), copy.frees(&copied)), (Bytes(95), Bytes(95)));
        let holders: Vec<_> =
            ledger.holders().into_iter().map(|h| (h.model.to_string(), h.bytes.0)).collect();
        assert_eq!(holders, [("a".to_owned(), 70), ("b".to_owned(), 25)]);
        assert_eq!((ledger.release(first), ledger.used()), (Bytes(10), Bytes(85)));
        assert_eq!((ledger.release(second), ledger.used()), (Bytes(85), Bytes::ZERO));
    }

    #[test]
    fn a_machine_with_less_memory_than_the_budget_limits_what_is_left() {
        let mut ledger = Ledger::new(Bytes(100));
        ledger.set_ceiling(Some(Bytes(200)));
        assert_eq!((ledger.limit(), ledger.left(), ledger.ceiling()), (Bytes(100), Bytes(100), None));
        ledger.set_ceiling(Some(Bytes(50)));
        assert_eq!(
            ledger.try_reserve(&name("a"), Bytes(60)).unwrap_err(),
            Shortfall { asked: Bytes(60), left: Bytes(50) }
        );
        assert_eq!((ledger.budget(), ledger.ceiling()), (Bytes(100), Some(Bytes(50))));
        ledger.set_others(Bytes(70));
        assert_eq!((ledger.share(), ledger.limit()), (Bytes(30), Bytes(30)), "others have the rest");
        ledger.set_others(Bytes(20));
        assert_eq!((ledger.share(), ledger.limit()), (Bytes(80), Bytes(50)));
        ledger.set_spare(Bytes(5));
        assert_eq!((ledger.limit(), ledger.left()), (Bytes(50), Bytes(45)));
    }

    #[test]
    fn holders_are_named_largest_first() {
        let mut ledger = Ledger::new(Bytes(100));
        let kept: Vec<_> = [("a", 10), ("b", 30), ("a", 25), ("c", 0)]
            .map(|(model, bytes)| ledger.try_reserve(&name(model), Bytes(bytes)).unwrap())
            .into();
        let holders: Vec<_> =
            ledger.holders().into_iter().map(|h| (h.model.to_string(), h.bytes.0)).collect();
        assert_eq!(holders, [("a".to_owned(), 35), ("b".to_owned(), 30)]);
        assert_eq!(kept.len(), 4);
    }
}

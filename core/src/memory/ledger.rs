use std::collections::BTreeMap;

use crate::error::Holder;
use crate::units::{Bytes, ModelName};

/// Who holds how much of the budget. Plain arithmetic: it measures nothing and asks nobody.
///
/// An entry lives from before a load starts until the memory is really back, so the sum of the entries is an upper
/// bound of what models hold, also while loads and unloads overlap.
#[derive(Debug)]
pub struct Ledger {
    budget: Bytes,
    used: Bytes,
    peak: Bytes,
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    model: ModelName,
    bytes: Bytes,
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
        Self { budget, used: Bytes::ZERO, peak: Bytes::ZERO, next: 0, entries: BTreeMap::new() }
    }

    /// Takes `bytes` out of the budget for `model`.
    ///
    /// # Errors
    /// Less than that is left; nothing was taken.
    pub fn try_reserve(&mut self, model: &ModelName, bytes: Bytes) -> Result<Reservation, Shortfall> {
        if bytes > self.left() {
            return Err(Shortfall { asked: bytes, left: self.left() });
        }
        let id = self.next;
        self.next += 1;
        self.entries.insert(id, Entry { model: model.clone(), bytes });
        self.used += bytes;
        self.peak = self.peak.max(self.used);
        Ok(Reservation { id })
    }

    /// Corrects an entry to what the model was found to hold. This may exceed the budget: the memory is taken
    /// already, and the ledger says what is true.
    pub fn settle(&mut self, reservation: &Reservation, bytes: Bytes) {
        if let Some(entry) = self.entries.get_mut(&reservation.id) {
            self.used = self.used - entry.bytes + bytes;
            entry.bytes = bytes;
            self.peak = self.peak.max(self.used);
        }
    }

    /// Gives an entry back, once its memory is really back. Returns its bytes.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "taking the token is the point: it cannot be used again"
    )]
    pub fn release(&mut self, reservation: Reservation) -> Bytes {
        let bytes = self.entries.remove(&reservation.id).map_or(Bytes::ZERO, |entry| entry.bytes);
        self.used = self.used - bytes;
        bytes
    }

    /// What an entry holds.
    #[must_use]
    pub fn bytes(&self, reservation: &Reservation) -> Bytes {
        self.entries.get(&reservation.id).map_or(Bytes::ZERO, |entry| entry.bytes)
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

    /// What is left of the budget; zero where the entries exceed it.
    #[must_use]
    pub fn left(&self) -> Bytes {
        self.budget.saturating_sub(self.used)
    }

    /// Who holds how much, largest first; entries of one model are added up.
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        let mut by_model: BTreeMap<&ModelName, Bytes> = BTreeMap::new();
        for entry in self.entries.values() {
            *by_model.entry(&entry.model).or_default() += entry.bytes;
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

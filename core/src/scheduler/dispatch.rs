use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::policy::{Candidate, Choice, Eviction, Need, Together, choose};
use super::queue::Waiting;
use super::slot::{Cause, Held, Slot, State};
use super::{Effect, STAYS_SHORT, STEADY, Scheduler, SlotId};
use crate::config::Class;
use crate::error::Error;
use crate::memory::{Claim, Estimate, Shortfall};
use crate::units::{Bytes, ModelName, Timestamp};

/// Room that requests later in the order may still use.
struct Room {
    /// Free now.
    bytes: Bytes,
    /// Free when the unloads under way have ended.
    coming: Bytes,
    /// Places among the LLMs, free now.
    llms: usize,
    /// Places among the LLMs that the unloads under way will free.
    llms_coming: usize,
    /// Whether a request that has waited long enough keeps the bytes, or the places, that are left for itself.
    bytes_kept: bool,
    llms_kept: bool,
}

/// What becomes of a waiting request.
enum Decision {
    Wait,
    Grant,
    Reject(Error),
    NeverFits(Error),
    Estimate,
    Load(Estimate),
    Free(Vec<Freeing>),
}

/// What an idle model does for others.
enum Freeing {
    Evict(SlotId),
    /// Its context becomes as in this.
    Shorten(SlotId, Estimate),
}

impl Scheduler {
    /// Looks at every waiting request, most urgent first, and does for each what can be done now. Requests for
    /// models that are ready come before all loads, so that a model whose user is already here is no victim.
    pub(super) fn dispatch(&mut self, now: Timestamp) {
        self.enforce_budget(now);
        (self.wanted, self.stays_until) = (Bytes::ZERO, None);
        let order = self.queue.in_order(now, self.limits.aging);
        let mut room = self.room();
        let draining = self.draining(&order, now);
        for (position, waiting) in order.iter().enumerate() {
            if draining.as_ref().is_none_or(|d| position < d.position || !d.victims.contains(&waiting.slot)) {
                self.grant_if_ready(waiting, now);
            }
        }
        // A resident's load never waits behind an LLM's.
        let (residents, others): (Vec<_>, Vec<_>) =
            order.into_iter().partition(|waiting| self.is_resident(waiting.slot));
        let mut seen = BTreeSet::new();
        for waiting in residents.iter().chain(&others) {
            // Whoever waits for the same slot waits for the same room: the first one speaks for all.
            if self.queue.contains(waiting.id) && seen.insert(waiting.slot) {
                let decision = self.decide(waiting, &mut room, now);
                self.carry_out(decision, waiting, now);
            }
        }
    }

    /// The decision tree. Names and capabilities are checked before a request gets here:
    ///
    /// 1. unknown model → error (by the pool, which knows the names)
    /// 2. capability missing, or a load that failed a moment ago → error (on arrival)
    /// 3. ready and below its concurrency → grant
    /// 4. ready and busy, or on its way in or out → wait, so that loads are single-flight
    /// 5. size unknown, or known for less room than there is → find it out
    /// 6. can never fit → error with the numbers, nothing evicted
    /// 7. fits → load
    /// 8. will fit when the unloads under way have ended → wait
    /// 9. victims suffice → take the smallest sufficient set, shorten the contexts of those where that is enough, evict the
    ///    others, then wait for their memory
    /// 10. else wait; having waited long, keep what is free of what it lacks
    fn decide(&mut self, waiting: &Waiting, room: &mut Room, now: Timestamp) -> Decision {
        let slot = &self.slots[waiting.slot.0];
        let estimate = match &slot.state {
            // 3 was done for all of these before any load; 4.
            State::Ready { .. }
            | State::Loading { .. }
            | State::Resizing { .. }
            | State::Unloading { .. } => return Decision::Wait,
            State::Estimating { before, .. } => {
                // What it will need at least is not for those who are less urgent.
                if let Some(before) = before {
                    room.take(self.need(waiting.slot, before));
                }
                return Decision::Wait;
            }
            // 2, for requests that were let in before the load failed or the engine ended; 5.
            State::Absent => return slot.backoff_error(now).map_or(Decision::Estimate, Decision::Reject),
            // 5 again: room has come since, which a longer context may use, or gone, and a shorter one may fit.
            State::Sized { estimate, left }
                if self.has_come(*left) || self.no_longer_fits(estimate, *left) =>
            {
                room.take(self.need(waiting.slot, estimate));
                return Decision::Estimate;
            }
            State::Sized { estimate, .. } => estimate.clone(),
        };
        // 6
        if let Some(error) = self.never_fits(waiting.slot, &estimate) {
            return Decision::NeverFits(error);
        }
        let resident = self.is_resident(waiting.slot);
        let need = self.need(waiting.slot, &estimate);
        let kept = room.bytes_kept && need.bytes > Bytes::ZERO || room.llms_kept && need.llms > 0;
        if kept && !resident {
            return Decision::Wait;
        }
        // 7
        if need.bytes <= room.bytes && need.llms <= room.llms {
            room.take(need);
            return Decision::Load(estimate);
        }
        // 8
        let missing = room.missing(need);
        if missing == Need::default() {
            room.take(need);
            return Decision::Wait;
        }
        // 9
        let choice = self.victims_for(missing, waiting, now);
        if choice.sufficient {
            let freeing = self.gently(choice.victims, missing);
            room.coming += self.freed_by(&freeing);
            room.llms_coming += missing.llms;
            room.take(need);
            return Decision::Free(freeing);
        }
        // 10
        self.stays_until = self.stays_until.into_iter().chain(self.next_victim(now)).min();
        if self.wanted == Bytes::ZERO {
            let own: Vec<Freeing> = choice.victims.into_iter().map(Freeing::Evict).collect();
            self.wanted = need.bytes.saturating_sub(room.coming + self.freed_by(&own));
        }
        let guess = self.queue.spare(waiting.slot).is_some();
        if !resident && !guess && self.has_waited_long(waiting.slot, now) {
            room.bytes_kept |= missing.bytes > Bytes::ZERO;
            room.llms_kept |= missing.llms > 0;
        }
        Decision::Wait
    }

    /// Whether there is more room than there was, by enough to size a load again for it.
    fn has_come(&self, left: Bytes) -> bool {
        self.ledger.left().saturating_sub(left) > Bytes(self.ledger.limit().0 / STEADY)
    }

    /// Whether an estimate would have fitted into what was left when it was made, but does not now.
    fn no_longer_fits(&self, estimate: &Estimate, left: Bytes) -> bool {
        let needed = self.ledger.needed(&estimate.into());
        needed <= left && needed > self.ledger.left()
    }

    fn carry_out(&mut self, decision: Decision, waiting: &Waiting, now: Timestamp) {
        let slot = waiting.slot;
        match decision {
            Decision::Wait => {}
            Decision::Grant => self.grant(waiting, now),
            Decision::Reject(error) => self.reject_waiters(slot, &|_| error.clone()),
            Decision::NeverFits(error) => {
                self.set_state(slot, State::Absent, Cause::TooLarge, now);
                self.reject_waiters(slot, &|_| error.clone());
            }
            Decision::Estimate => {
                let left = self.ledger.left();
                let before = match &self.slots[slot.0].state {
                    State::Sized { estimate, .. } => Some(estimate.clone()),
                    _ => None,
                };
                self.set_state(slot, State::Estimating { before }, Cause::Request, now);
                let taken = self.ledger.used() + self.limits.reserve;
                self.effects.push_back(Effect::Estimate { slot, left, taken });
            }
            Decision::Load(estimate) => self.start_load(slot, estimate, now),
            Decision::Free(freeing) => self.free(freeing, Cause::Evicted, now),
        }
    }

    /// Of those who would be evicted, the most valuable first, whoever can do with a shorter context instead does.
    fn gently(&self, victims: Vec<SlotId>, need: Need) -> Vec<Freeing> {
        let mut freeing: Vec<Freeing> = victims.into_iter().map(Freeing::Evict).collect();
        // A shorter context frees no place among the LLMs.
        if need.llms > 0 {
            return freeing;
        }
        for at in (0..freeing.len()).rev() {
            let Freeing::Evict(victim) = freeing.remove(at) else { continue };
            let missing = need.bytes.saturating_sub(self.freed_by(&freeing));
            let held = self.slots[victim.0].state.held();
            let shorter = held.and_then(|held| Some((held.shorter(missing)?, &held.estimate)));
            freeing.insert(
                at,
                match shorter {
                    Some((shorter, now)) if now.saves(shorter) >= missing => {
                        Freeing::Shorten(victim, shorter.clone())
                    }
                    _ => Freeing::Evict(victim),
                },
            );
        }
        freeing
    }

    /// What will be free besides what is on its way already. The last who holds weights brings them.
    fn freed_by(&self, freeing: &[Freeing]) -> Bytes {
        let evicted = freeing.iter().filter_map(|one| match one {
            Freeing::Evict(slot) => Some(*slot),
            Freeing::Shorten(..) => None,
        });
        let shortened = freeing.iter().filter_map(|one| match one {
            Freeing::Evict(_) => None,
            Freeing::Shorten(slot, to) => Some(self.slots[slot.0].state.held()?.estimate.saves(to)),
        });
        let evicted = self.frees(self.unloading().chain(evicted)) - self.frees(self.unloading());
        evicted + shortened.sum()
    }

    fn free(&mut self, freeing: Vec<Freeing>, cause: Cause, now: Timestamp) {
        for one in freeing {
            match one {
                Freeing::Evict(slot) => self.start_unload(slot, cause, now),
                Freeing::Shorten(slot, to) => self.start_resize(slot, to, Cause::Shortened, now),
            }
        }
    }

    fn grant_if_ready(&mut self, waiting: &Waiting, now: Timestamp) {
        let slot = &self.slots[waiting.slot.0];
        let State::Ready { held, leases, lost: None, .. } = &slot.state else { return };
        match self.whole_again(slot, held, now).filter(|_| *leases == 0) {
            Some(whole) => self.start_resize(waiting.slot, whole, Cause::Lengthened, now),
            None if *leases < slot.spec.parallel => self.carry_out(Decision::Grant, waiting, now),
            None => {}
        }
    }

    /// The context that a model was loaded with, where it was made shorter some time ago and there is room for all of it,
    /// which nobody else waits for.
    fn whole_again(&self, slot: &Slot, held: &Held, now: Timestamp) -> Option<Estimate> {
        let whole = held.whole.as_deref()?;
        let room = whole.saves(&held.estimate) <= self.ledger.left() && !self.pressed;
        let long_ago = slot.shortened.is_none_or(|at| now.since(at) >= STAYS_SHORT);
        let wanted = |(at, slot): (usize, &Slot)| {
            matches!(slot.state, State::Absent | State::Estimating { .. } | State::Sized { .. })
                && self.queue.waits_for(SlotId(at))
        };
        (room && long_ago && !self.slots.iter().enumerate().any(wanted)).then(|| whole.clone())
    }

    fn grant(&mut self, waiting: &Waiting, now: Timestamp) {
        let slot = &mut self.slots[waiting.slot.0];
        let State::Ready { leases, .. } = &mut slot.state else { return };
        *leases += 1;
        self.grants += 1;
        slot.uses = (slot.uses_after(self.grants) + 1.0, self.grants);
        let loading = slot.loading_since(waiting.arrived);
        let queued = now.since(waiting.arrived).saturating_sub(loading);
        self.queue.remove(waiting.id);
        self.leases.insert(waiting.id, waiting.slot);
        self.effects.push_back(Effect::Grant { id: waiting.id, slot: waiting.slot, queued, loading });
    }

    fn start_load(&mut self, slot: SlotId, estimate: Estimate, now: Timestamp) {
        let model = self.slots[slot.0].spec.model.clone();
        // The room was computed from this same ledger; should they ever differ, the ledger is right, and the slot goes on
        // waiting.
        let reservation = match self.ledger.try_reserve(&model, &estimate) {
            Ok(reservation) => reservation,
            Err(Shortfall { asked, left }) => {
                debug_assert!(false, "{model} needs {asked} and was promised them, but {left} are left");
                tracing::error!(%model, %asked, %left, "room was promised to a load that is not there");
                return;
            }
        };
        let held = Held { reservation, estimate: estimate.clone(), measured: None, whole: None };
        let loading = State::Loading { held, started: now, cancelled: false };
        self.set_state(slot, loading, Cause::Request, now);
        self.effects.push_back(Effect::StartLoad { slot, estimate });
    }

    /// Evicts idle models while the ledger exceeds the budget, which became smaller or was overrun by a load, or what the
    /// machine has memory for. Models that someone waits for are not idle in this sense: they would only be loaded again.
    fn enforce_budget(&mut self, now: Timestamp) {
        self.pressed &= self.held_in_the_end() > self.ledger.limit();
        if let Some(over) = self.over_budget() {
            let held = self.held_in_the_end();
            let cause = if held > self.ledger.budget() {
                Cause::Budget
            } else if held > self.ledger.share() {
                Cause::Others
            } else {
                Cause::Pressure
            };
            let choice = self
                .victims_among(over, None, now, |slot, leases| leases == 0 && !self.queue.waits_for(slot));
            let freeing = if choice.sufficient {
                self.gently(choice.victims, over)
            } else {
                choice.victims.into_iter().map(Freeing::Evict).collect()
            };
            self.free(freeing, cause, now);
        }
    }

    /// What the ledger holds, what is on its way out excepted.
    pub(super) fn held_in_the_end(&self) -> Bytes {
        self.ledger.used().saturating_sub(self.coming())
    }

    /// What will be free when the unloads under way have ended, and contexts have become shorter.
    fn coming(&self) -> Bytes {
        let saved = self.slots.iter().filter_map(|slot| match &slot.state {
            State::Resizing { held, becomes, .. } => {
                Some(self.ledger.bytes(&held.reservation).saturating_sub(*becomes))
            }
            _ => None,
        });
        self.frees(self.unloading()) + saved.sum()
    }

    /// Whether the budget holds, or will once other idle models than `slot` are evicted.
    pub(super) fn can_make_good(&self, slot: SlotId, now: Timestamp) -> bool {
        self.over_budget().is_none_or(|over| {
            let others = |other, leases| leases == 0 && other != slot && !self.queue.waits_for(other);
            self.victims_among(over, None, now, others).sufficient
        })
    }

    /// What has to go: what the ledger holds beyond what other processes leave of the budget, or beyond what the machine has memory for when that has
    /// become short.
    fn over_budget(&self) -> Option<Need> {
        let limit = if self.pressed { self.ledger.limit() } else { self.ledger.share() };
        let bytes = self.held_in_the_end().saturating_sub(limit);
        (bytes > Bytes::ZERO).then_some(Need { bytes, llms: 0 })
    }

    fn is_resident(&self, slot: SlotId) -> bool {
        self.slots[slot.0].spec.class == Class::Resident
    }

    fn never_fits(&self, slot: SlotId, estimate: &Estimate) -> Option<Error> {
        let model = self.slots[slot.0].spec.model.clone();
        let pinned = || self.slots.iter().filter(|other| other.pinned);
        let mut reservations = pinned().filter_map(|other| other.state.held()).map(|held| &held.reservation);
        let held = self.pinned();
        let claim = Claim::from(estimate);
        let shares = |reservation| {
            self.ledger
                .claim(reservation)
                .weights
                .is_some_and(|(id, _)| Some(&id) == estimate.weights_id.as_ref())
        };
        // Weights that a pinned model holds are there, and among what it holds.
        let asked = if reservations.any(shares) { claim.own } else { claim.total() };
        let budget = self.ledger.budget();
        let left = budget.saturating_sub(held + self.ledger.spare());
        if asked > left {
            let names: BTreeSet<&ModelName> = pinned().map(|other| &other.spec.model).collect();
            let holders = self.ledger.holders().into_iter().filter(|h| names.contains(&h.model)).collect();
            return Some(Error::OverBudget { model, asked, left, budget, holders });
        }
        let pinned_llms: BTreeSet<&ModelName> =
            pinned().filter(|other| other.counts()).map(|other| &other.spec.model).collect();
        let limit = self.limits.max_concurrent_llms;
        let needs_place = self.slots[slot.0].spec.llm && !pinned_llms.contains(&model);
        (needs_place && pinned_llms.len() >= limit).then_some(Error::TooManyLlms { model, limit })
    }

    fn room(&self) -> Room {
        let held = self.slots_per_llm(|_| true);
        let leaving = self.slots_per_llm(|state| matches!(state, State::Unloading { .. }));
        let llms_coming = leaving.iter().filter(|(model, count)| held.get(*model) == Some(count)).count();
        Room {
            bytes: self.ledger.left(),
            coming: self.coming(),
            llms: self.limits.max_concurrent_llms.saturating_sub(held.len()),
            llms_coming,
            bytes_kept: false,
            llms_kept: false,
        }
    }

    fn need(&self, slot: SlotId, estimate: &Estimate) -> Need {
        Need { bytes: self.ledger.needed(&estimate.into()), llms: self.llms_needed(slot) }
    }

    /// Places among the LLMs that a load of `slot` takes: none if its model has one already. A place that is about to
    /// become free may be promised to someone else, so it does not count as had.
    fn llms_needed(&self, slot: SlotId) -> usize {
        let spec = &self.slots[slot.0].spec;
        let stays = |state: &State| !matches!(state, State::Unloading { .. });
        let has_one = self.slots.iter().any(|s| s.counts() && s.spec.model == spec.model && stays(&s.state));
        usize::from(spec.llm && !has_one)
    }

    fn victims(&self, need: Need, wanted: SlotId, now: Timestamp) -> Choice {
        self.victims_among(need, Some(wanted), now, |slot, leases| leases == 0 && !self.stays(slot, now))
    }

    /// The same for one who waits. All that wait for the slot have to spare a model for it to be spared.
    fn victims_for(&self, need: Need, waiting: &Waiting, now: Timestamp) -> Choice {
        let spare = self.queue.spare(waiting.slot);
        let spared = |slot: SlotId| match self.slots[slot.0].state {
            State::Ready { idle_since, .. } => spare.is_some_and(|spare| now.since(idle_since) < spare),
            _ => false,
        };
        self.victims_among(need, Some(waiting.slot), now, |slot, leases| {
            leases == 0 && !self.stays(slot, now) && !spared(slot)
        })
    }

    /// Whether a model was pushed about and has only just come back.
    fn stays(&self, slot: SlotId, now: Timestamp) -> bool {
        self.limits.eviction == Eviction::CostAware
            && self.slots[slot.0].stays_until().is_some_and(|until| until > now)
    }

    /// When the first of the models that stay for now becomes a victim again.
    fn next_victim(&self, now: Timestamp) -> Option<Timestamp> {
        let idle = |slot: &SlotId| matches!(self.slots[slot.0].state, State::Ready { leases: 0, .. });
        let stay = (0..self.slots.len()).map(SlotId).filter(|slot| idle(slot) && self.stays(*slot, now));
        stay.filter_map(|slot| self.slots[slot.0].stays_until()).min()
    }

    /// Whom to evict, for `wanted` if it is for one slot, among the ready and unpinned slots that `may` be taken by
    /// their number of leases.
    fn victims_among(
        &self,
        need: Need,
        wanted: Option<SlotId>,
        now: Timestamp,
        may: impl Fn(SlotId, usize) -> bool,
    ) -> Choice {
        let own = wanted.map(|slot| &self.slots[slot.0].spec.model);
        let candidates: Vec<Candidate> = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| !slot.pinned)
            .filter_map(|(at, slot)| {
                let State::Ready { leases, .. } = &slot.state else { return None };
                let candidate = self.candidate(SlotId(at), now).filter(|_| may(SlotId(at), *leases))?;
                Some(Candidate { llm: candidate.llm.filter(|model| Some(model) != own), ..candidate })
            })
            .collect();
        choose(&candidates, &self.together(), need, self.limits.eviction)
    }

    /// What a ready slot is chosen by.
    pub(super) fn candidate(&self, id: SlotId, now: Timestamp) -> Option<Candidate> {
        let slot = &self.slots[id.0];
        let State::Ready { held, idle_since, .. } = &slot.state else { return None };
        Some(Candidate {
            slot: id,
            llm: slot.spec.llm.then(|| slot.spec.model.clone()),
            class: slot.spec.class,
            claim: self.ledger.claim(&held.reservation),
            idle: now.since(*idle_since),
            reload: slot.last_load.map_or(Duration::ZERO, |(started, ended)| ended.since(started)),
            uses: slot.uses_after(self.grants),
        })
    }

    /// The models that get no new requests because someone has waited too long for their room.
    fn draining(&self, order: &[Waiting], now: Timestamp) -> Option<Draining> {
        let (position, waiting, estimate) = order.iter().enumerate().find_map(|(position, waiting)| {
            match &self.slots[waiting.slot.0].state {
                State::Sized { estimate, .. }
                    if self.has_waited_long(waiting.slot, now)
                        && self.queue.spare(waiting.slot).is_none() =>
                {
                    Some((position, waiting, estimate))
                }
                _ => None,
            }
        })?;
        let need = self.need(waiting.slot, estimate);
        let missing = self.room().missing(need);
        if missing == Need::default() {
            return None;
        }
        // Whoever is idle goes first, and must not be given to someone else in this same round.
        let idle = self.victims(missing, waiting.slot, now);
        // If that is not enough: as if all that is in use were idle.
        let choice = if idle.sufficient {
            idle
        } else {
            self.victims_among(missing, Some(waiting.slot), now, |_, _| true)
        };
        choice.sufficient.then_some(Draining { position, victims: choice.victims })
    }

    /// Whoever waits for a slot waits for the same room, so the one who came first speaks for all.
    fn has_waited_long(&self, slot: SlotId, now: Timestamp) -> bool {
        self.queue.oldest_for(slot).is_some_and(|arrived| now.since(arrived) >= self.limits.drain_after)
    }

    fn unloading(&self) -> impl Iterator<Item = SlotId> {
        let leaving = |slot: &Slot| matches!(slot.state, State::Unloading { .. });
        self.slots.iter().enumerate().filter(move |(_, slot)| leaving(slot)).map(|(at, _)| SlotId(at))
    }

    /// What is free once all of these are back.
    fn frees(&self, slots: impl Iterator<Item = SlotId>) -> Bytes {
        let held = slots.filter_map(|slot| self.slots[slot.0].state.held());
        self.ledger.frees(held.map(|held| &held.reservation))
    }

    fn together(&self) -> Together {
        let stays = |state: &State| !matches!(state, State::Unloading { .. });
        let mut together = Together { llms: self.slots_per_llm(stays), ..Together::default() };
        let staying = self.slots.iter().filter(|slot| stays(&slot.state));
        for held in staying.filter_map(|slot| slot.state.held()) {
            if let Some((id, _)) = self.ledger.claim(&held.reservation).weights {
                *together.weights.entry(id).or_default() += 1;
            }
        }
        together
    }

    fn slots_per_llm(&self, state: impl Fn(&State) -> bool) -> BTreeMap<ModelName, usize> {
        let mut count = BTreeMap::new();
        for slot in self.slots.iter().filter(|slot| slot.counts() && state(&slot.state)) {
            *count.entry(slot.spec.model.clone()).or_default() += 1;
        }
        count
    }
}

/// See [`Scheduler::draining`].
struct Draining {
    /// Requests before this place in the order are not held back.
    position: usize,
    victims: Vec<SlotId>,
}

impl Room {
    /// What is missing for `need` even when the unloads under way have ended.
    fn missing(&self, need: Need) -> Need {
        Need {
            bytes: need.bytes.saturating_sub(self.bytes + self.coming),
            llms: need.llms.saturating_sub(self.llms + self.llms_coming),
        }
    }

    /// Sets `need` aside: first from what is free, then from what is coming.
    fn take(&mut self, need: Need) {
        let now = need.bytes.min(self.bytes);
        self.bytes = self.bytes - now;
        self.coming = self.coming.saturating_sub(need.bytes - now);
        let places = need.llms.min(self.llms);
        self.llms -= places;
        self.llms_coming = self.llms_coming.saturating_sub(need.llms - places);
    }
}

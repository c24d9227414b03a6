//! A world around a scheduler: it carries effects out when the test says so, and checks after every single effect
//! what must hold at every moment.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sarai_core::Error;
use sarai_core::answer::Priority;
use sarai_core::config::Class;
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::memory::{Estimate, Footprint};
use sarai_core::request::{Capabilities, Capability};
use sarai_core::scheduler::{
    Ask, Change, Chosen, Effect, Event, Eviction, Limits, Phase, RequestId, Scheduler, SlotId, SlotSpec,
};
use sarai_core::units::{Bytes, Timestamp};

/// A slot of the world: what the scheduler knows of it, and the size it will turn out to have.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) spec: SlotSpec,
    pub(crate) size: u64,
    /// The part of the size that is its context's. It can become a half and a quarter of that.
    pub(crate) context: u64,
}

impl Model {
    /// With so much of its size in its context.
    pub(crate) fn context(self, context: u64) -> Self {
        assert!(context <= self.size);
        Self { context, ..self }
    }

    fn estimate(&self) -> Estimate {
        let at = |part: u64| Estimate {
            weights: Bytes(self.size - self.context),
            kv: Bytes(self.context / part),
            n_ctx: Some(u32::try_from(8000 / part).unwrap()),
            ..Estimate::default()
        };
        let shorter = if self.context > 0 { vec![at(2), at(4)] } else { Vec::new() };
        Estimate { shorter, ..at(1) }
    }
}

pub(crate) fn llm(name: &str, size: u64) -> Model {
    let spec = SlotSpec {
        model: name.parse().unwrap(),
        llm: true,
        class: Class::OnDemand,
        capabilities: Capabilities::of(&[Capability::Generate]),
        parallel: 1,
        ttl: None,
    };
    Model { spec, size, context: 0 }
}

pub(crate) fn helper(name: &str, size: u64) -> Model {
    let mut model = llm(name, size);
    model.spec.llm = false;
    model.spec.class = Class::Resident;
    model.spec.parallel = 4;
    model
}

pub(crate) fn limits(budget: u64, max_concurrent_llms: usize) -> Limits {
    Limits {
        budget: Bytes(budget),
        spare: Bytes::ZERO,
        reserve: Bytes::ZERO,
        eviction: Eviction::Lru,
        max_concurrent_llms,
        max_waiting: 8,
        aging: Duration::from_secs(30),
        drain_after: Duration::from_secs(5),
    }
}

/// What became of a request.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Granted,
    Rejected(Error),
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) models: Vec<Model>,
    pub(crate) limits: Limits,
    pub(crate) now: Timestamp,
    pub(crate) estimating: Vec<SlotId>,
    /// What each estimate was told that the budget has left.
    pub(crate) offered: Vec<(SlotId, Bytes)>,
    pub(crate) loading: Vec<SlotId>,
    pub(crate) unloading: Vec<SlotId>,
    pub(crate) resizing: Vec<SlotId>,
    pub(crate) cancelled: BTreeSet<SlotId>,
    pub(crate) loaded: BTreeSet<SlotId>,
    pub(crate) pinned: BTreeSet<SlotId>,
    pub(crate) lost: BTreeSet<SlotId>,
    pub(crate) leases: BTreeMap<RequestId, SlotId>,
    pub(crate) waiting: BTreeMap<RequestId, SlotId>,
    pub(crate) outcomes: BTreeMap<RequestId, Outcome>,
    pub(crate) changes: Vec<Change>,
    pub(crate) chosen: Vec<Chosen>,
    pub(crate) settled: Vec<Change>,
    pub(crate) unload_results: Vec<Result<Bytes, Error>>,
    pub(crate) stopped: bool,
    /// Bytes promised to loads and not yet back from unloads, as this world counts them.
    held: BTreeMap<SlotId, u64>,
    /// What other processes really have of the budget, which the scheduler may not have heard of yet.
    pub(crate) really: u64,
    /// What the machine really has for this process, which the scheduler may not have heard of yet.
    pub(crate) machine_has: Option<u64>,
    /// What those whose context changes will hold, and what they will be estimated at.
    becomes: BTreeMap<SlotId, (u64, u64)>,
    /// What each that holds anything is estimated at, with the context that it has.
    shapes: BTreeMap<SlotId, u64>,
    /// What each took more than it was estimated at, and when.
    took: BTreeMap<SlotId, (u64, Timestamp)>,
    /// What each estimate was told that is spoken for.
    spoken_for: BTreeMap<SlotId, Bytes>,
    /// What other processes were told that is held here.
    written: u64,
    held_before: u64,
    /// What was held beyond the budget when it became smaller, or when a model was found to hold more.
    over: u64,
    next: u64,
    events: usize,
    aborting: bool,
}

impl World {
    pub(crate) fn new(limits: Limits, models: Vec<Model>) -> Self {
        let specs: Vec<SlotSpec> = models.iter().map(|model| model.spec.clone()).collect();
        let residents = specs.iter().enumerate().filter(|(_, spec)| spec.class == Class::Resident);
        Self {
            pinned: residents.map(|(slot, _)| SlotId(slot)).collect(),
            scheduler: Scheduler::new(limits, specs),
            models,
            limits,
            now: Timestamp::default(),
            estimating: Vec::new(),
            offered: Vec::new(),
            loading: Vec::new(),
            unloading: Vec::new(),
            resizing: Vec::new(),
            really: 0,
            machine_has: None,
            becomes: BTreeMap::new(),
            shapes: BTreeMap::new(),
            took: BTreeMap::new(),
            spoken_for: BTreeMap::new(),
            written: 0,
            held_before: 0,
            over: 0,
            cancelled: BTreeSet::new(),
            loaded: BTreeSet::new(),
            lost: BTreeSet::new(),
            leases: BTreeMap::new(),
            waiting: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            changes: Vec::new(),
            chosen: Vec::new(),
            settled: Vec::new(),
            unload_results: Vec::new(),
            stopped: false,
            held: BTreeMap::new(),
            next: 0,
            events: 0,
            aborting: false,
        }
    }

    /// A request with a long deadline. Its estimate, if one is asked for, comes at once.
    pub(crate) fn request(&mut self, slot: usize) -> RequestId {
        self.request_with(slot, Priority::Normal, Duration::from_secs(1000))
    }

    pub(crate) fn request_with(&mut self, slot: usize, priority: Priority, wait: Duration) -> RequestId {
        let id = self.next_id();
        self.waiting.insert(id, SlotId(slot));
        let capability = if self.models[slot].spec.capabilities.has(Capability::Embed) {
            Capability::Embed
        } else {
            Capability::Generate
        };
        let ask = Ask { capability, priority, deadline: self.now + wait, spare: None };
        self.event(Event::Request { id, slot: SlotId(slot), ask });
        self.finish_estimates();
        id
    }

    /// The same, whose estimate the test gives itself.
    pub(crate) fn request_unsized(&mut self, slot: usize) -> RequestId {
        let id = self.next_id();
        self.waiting.insert(id, SlotId(slot));
        let deadline = self.now + Duration::from_secs(1000);
        let ask = Ask { capability: Capability::Generate, priority: Priority::Normal, deadline, spare: None };
        self.event(Event::Request { id, slot: SlotId(slot), ask });
        take(&mut self.estimating, SlotId(slot));
        id
    }

    pub(crate) fn give_back(&mut self, id: RequestId) {
        self.leases.remove(&id);
        self.waiting.remove(&id);
        self.event(Event::Return { id });
        self.finish_estimates();
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        self.event(Event::Tick);
        self.finish_estimates();
    }

    pub(crate) fn finish_estimates(&mut self) {
        while let Some(slot) = self.estimating.pop() {
            let result = Ok(self.models[slot.0].estimate());
            let told = self.offered.iter().rev().find(|(offered, _)| *offered == slot);
            let left = told.map_or(Bytes::ZERO, |(_, left)| *left);
            let spoken_for = self.spoken_for[&slot];
            let has = self.machine_has.map_or(left, |has| Bytes(has).saturating_sub(spoken_for));
            let (short, left) = (has < left, left.min(has));
            self.event(Event::Estimated { slot, left, short, result });
        }
    }

    pub(crate) fn finish_load(&mut self, slot: usize) {
        self.end_load(SlotId(slot), None);
    }

    /// A load ends, and turns out to have taken so much.
    pub(crate) fn finish_load_taking(&mut self, slot: usize, bytes: u64) {
        self.took.remove(&SlotId(slot));
        self.found(SlotId(slot), bytes);
        self.end_load(SlotId(slot), Some(measured(bytes)));
    }

    fn end_load(&mut self, slot: SlotId, measured: Option<Footprint>) {
        take(&mut self.loading, slot);
        self.cancelled.remove(&slot);
        self.loaded.insert(slot);
        if measured.is_none() {
            self.took.remove(&slot);
        }
        self.event(Event::Loaded { slot, result: Ok(measured) });
        self.finish_estimates();
    }

    /// A ready slot turns out to hold so much by now.
    pub(crate) fn grow(&mut self, slot: usize, bytes: u64) {
        self.found(SlotId(slot), bytes);
        self.event(Event::Measured { slot: SlotId(slot), footprint: measured(bytes) });
        self.finish_estimates();
    }

    fn found(&mut self, slot: SlotId, bytes: u64) {
        let held = self.held.entry(slot).or_default();
        *held = bytes.max(*held);
        self.over = self.held();
        if bytes > self.shapes[&slot] {
            self.took.insert(slot, (bytes, self.now));
        }
    }

    /// What a load of a slot asks for, if it is asked for now.
    pub(crate) fn asks(&self, slot: usize) -> u64 {
        let fresh = |(_, at): &&(u64, Timestamp)| self.now.since(*at) < Duration::from_mins(10);
        let took = self.took.get(&SlotId(slot)).filter(fresh).map_or(0, |(bytes, _)| *bytes);
        self.models[slot].size.max(took)
    }

    /// Whether a slot has the context that it was loaded with.
    pub(crate) fn is_whole(&self, slot: usize) -> bool {
        self.shapes.get(&SlotId(slot)) == Some(&self.models[slot].size)
    }

    pub(crate) fn budget(&mut self, budget: u64) {
        self.limits.budget = Bytes(budget);
        self.over = self.held();
        self.event(Event::Budget { budget: Bytes(budget) });
        self.finish_estimates();
    }

    pub(crate) fn fail_load(&mut self, slot: usize, kind: FailureKind) {
        let slot = SlotId(slot);
        take(&mut self.loading, slot);
        self.cancelled.remove(&slot);
        self.held.remove(&slot);
        self.shapes.remove(&slot);
        self.event(Event::Loaded { slot, result: Err(Failure::new(kind, "scripted")) });
        self.finish_estimates();
    }

    pub(crate) fn finish_unload(&mut self, slot: usize) {
        let slot = SlotId(slot);
        take(&mut self.unloading, slot);
        self.held.remove(&slot);
        self.shapes.remove(&slot);
        self.event(Event::Unloaded { slot });
        self.finish_estimates();
    }

    /// A slot has its other context. With a failure, its engine is of no use any more.
    pub(crate) fn finish_resize(&mut self, slot: usize, fails: bool) {
        let slot = SlotId(slot);
        take(&mut self.resizing, slot);
        let (becomes, shape) = self.becomes.remove(&slot).unwrap();
        let result = if fails {
            self.lost.insert(slot);
            Err(Failure::new(FailureKind::Engine, "scripted"))
        } else {
            self.held.insert(slot, becomes);
            self.shapes.insert(slot, shape);
            Ok(None)
        };
        self.event(Event::Resized { slot, result });
        self.finish_estimates();
    }

    /// The engine of a loaded slot ends by itself.
    pub(crate) fn lose(&mut self, slot: usize) {
        let slot = SlotId(slot);
        self.lost.insert(slot);
        self.event(Event::Lost { slot, cause: Failure::new(FailureKind::EngineGone, "scripted") });
        self.finish_estimates();
    }

    pub(crate) fn settle_unloads(&mut self) {
        while let Some(slot) = self.unloading.first().copied() {
            self.finish_unload(slot.0);
        }
    }

    /// Loads and unloads end until none is under way.
    pub(crate) fn settle(&mut self) {
        loop {
            if let Some(slot) = self.unloading.first().copied() {
                self.finish_unload(slot.0);
            } else if let Some(slot) = self.resizing.first().copied() {
                self.finish_resize(slot.0, false);
            } else if let Some(slot) = self.loading.first().copied() {
                if self.cancelled.contains(&slot) {
                    self.fail_load(slot.0, FailureKind::Cancelled);
                } else {
                    self.finish_load(slot.0);
                }
            } else {
                return;
            }
        }
    }

    pub(crate) fn unload(&mut self, slot: usize) {
        let id = self.next_id();
        self.event(Event::Unload { id, slot: SlotId(slot) });
    }

    pub(crate) fn pin(&mut self, slot: usize, pinned: bool) {
        if pinned {
            self.pinned.insert(SlotId(slot))
        } else {
            self.pinned.remove(&SlotId(slot))
        };
        self.event(Event::Pin { slot: SlotId(slot), pinned });
    }

    /// Other processes have so much of the budget.
    pub(crate) fn others(&mut self, taken: u64) {
        self.really = taken;
        self.event(Event::Others { taken: Bytes(taken) });
        self.finish_estimates();
    }

    /// Whether other processes leave no room for what is held here now and was not written down yet, for whatever reason; the
    /// scheduler hears of it.
    fn taken_before(&mut self, slot: SlotId) -> bool {
        let (budget, used) = self.scheduler.budget_and_used();
        let refused = used.0 > self.written && used.0 + self.really > budget.0;
        if refused {
            let taken = Bytes(self.really);
            self.scheduler.handle(Event::Taken { slot, taken }, self.now);
        } else {
            self.written = used.0;
        }
        refused
    }

    /// This process could hold so much just now.
    pub(crate) fn memory(&mut self, attainable: u64) {
        self.machine_has = Some(attainable);
        self.event(Event::Memory { attainable: Bytes(attainable) });
        self.finish_estimates();
    }

    pub(crate) fn abort(&mut self) {
        self.aborting = true;
        self.event(Event::Abort);
    }

    pub(crate) fn is_granted(&self, id: RequestId) -> bool {
        matches!(self.outcomes.get(&id), Some(Outcome::Granted))
    }

    pub(crate) fn rejection(&self, id: RequestId) -> Option<&Error> {
        match self.outcomes.get(&id) {
            Some(Outcome::Rejected(error)) => Some(error),
            _ => None,
        }
    }

    pub(crate) fn phase(&self, slot: usize) -> Phase {
        self.scheduler.status(self.now).slots[slot].phase
    }

    pub(crate) fn loaded(&self) -> Vec<usize> {
        self.loaded.iter().map(|slot| slot.0).collect()
    }

    pub(crate) fn holds(&self, slot: usize) -> u64 {
        self.held.get(&SlotId(slot)).copied().unwrap_or(0)
    }

    pub(crate) fn held(&self) -> u64 {
        self.held.values().sum()
    }

    pub(crate) fn llms(&self) -> usize {
        let held = self.held.keys().map(|slot| &self.models[slot.0].spec).filter(|spec| spec.llm);
        held.map(|spec| &spec.model).collect::<BTreeSet<_>>().len()
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.events += 1;
        self.held_before = self.written;
        assert!(self.events < 100_000, "the world goes round in circles: {:?}", self.changes.last());
        self.scheduler.handle(event, self.now);
        let mut effects = 0;
        while let Some(effect) = self.scheduler.poll_effect() {
            effects += 1;
            assert!(effects < 10_000, "an event without end: {effect:?}");
            self.carry_out(effect);
            self.check();
        }
        self.written = self.scheduler.budget_and_used().1.0;
    }

    fn next_id(&mut self) -> RequestId {
        self.next += 1;
        RequestId(self.next)
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Estimate { slot, left, taken } => {
                self.offered.push((slot, left));
                self.spoken_for.insert(slot, taken);
                self.estimating.push(slot);
            }
            Effect::StartLoad { slot, estimate } => {
                assert!(!self.held.contains_key(&slot), "{slot:?} is loaded twice");
                if estimate.at_load() > Bytes::ZERO && self.taken_before(slot) {
                    return;
                }
                self.held.insert(slot, estimate.reserve().0);
                self.shapes.insert(slot, estimate.total().0);
                // What this process held before the event is its own, whatever others took meanwhile.
                let limit = self.scheduler.status(self.now).limit.max(Bytes(self.held_before));
                let takes_none = estimate.reserve() == Bytes::ZERO;
                let fits = self.held() <= limit.0 || takes_none;
                assert!(fits, "{} held of {limit} that there are", self.held());
                self.loading.push(slot);
            }
            Effect::CancelLoad { slot } => {
                assert!(self.loading.contains(&slot), "{slot:?} is not loading");
                assert!(
                    !self.waiting.values().any(|waits| *waits == slot),
                    "someone still waits for {slot:?}"
                );
                self.cancelled.insert(slot);
            }
            Effect::Resize { slot, estimate, grows } => {
                assert!(self.loaded.contains(&slot) && !self.lost.contains(&slot), "{slot:?} is not ready");
                assert!(!self.leases.values().any(|used| *used == slot), "{slot:?} is in use");
                assert!(!self.resizing.contains(&slot), "{slot:?} is resized twice");
                let (is, becomes) = (self.shapes[&slot], estimate.total().0);
                assert_eq!(grows, becomes > is, "{slot:?}");
                assert!(grows || !self.pinned.contains(&slot), "{slot:?} is pinned");
                if grows && self.taken_before(slot) {
                    return;
                }
                let holds = self.held.entry(slot).or_default();
                let will_hold = (*holds + becomes).saturating_sub(is);
                *holds = will_hold.max(*holds);
                self.becomes.insert(slot, (will_hold, becomes));
                self.resizing.push(slot);
            }
            Effect::StartUnload { slot } => {
                assert!(!self.resizing.contains(&slot), "{slot:?} is being resized");
                assert!(self.loaded.remove(&slot), "{slot:?} is not loaded");
                self.lost.remove(&slot);
                if !self.aborting {
                    assert!(!self.leases.values().any(|used| *used == slot), "{slot:?} is in use");
                }
                self.unloading.push(slot);
            }
            Effect::Grant { id, slot, .. } => {
                assert_eq!(self.waiting.remove(&id), Some(slot), "{id:?} does not wait for {slot:?}");
                assert!(self.loaded.contains(&slot), "{slot:?} is not ready");
                assert!(!self.lost.contains(&slot), "{slot:?} is gone");
                assert!(!self.resizing.contains(&slot), "{slot:?} is being resized");
                self.leases.insert(id, slot);
                self.answer(id, Outcome::Granted);
            }
            Effect::Reject { id, error } => {
                assert!(self.waiting.remove(&id).is_some(), "{id:?} does not wait");
                self.answer(id, Outcome::Rejected(error));
            }
            Effect::UnloadDone { result, .. } => self.unload_results.push(result),
            Effect::Changed(change) => {
                assert!(change.used <= change.budget.max(Bytes(self.over)), "{change:?}");
                self.changes.push(change);
            }
            Effect::Chosen(chosen) => self.chosen.push(chosen),
            Effect::Settled(change) => self.settled.push(change),
            Effect::Stopped => self.stopped = true,
        }
    }

    fn answer(&mut self, id: RequestId, outcome: Outcome) {
        let before = self.outcomes.insert(id, outcome);
        assert!(before.is_none(), "{id:?} was answered twice: {before:?}");
    }

    /// What holds at every moment, by this world's own account.
    fn check(&mut self) {
        // More than the budget is held only where it became smaller, or a model was found to hold more; then it becomes less.
        let most = self.limits.budget.0.max(self.over);
        assert!(self.held() <= most, "{} of {} held", self.held(), self.limits.budget);
        self.over = self.held();
        assert!(self.llms() <= self.limits.max_concurrent_llms, "{} LLMs", self.llms());
        assert!(self.waiting.len() <= self.limits.max_waiting + 1, "{} wait", self.waiting.len());
        for (slot, model) in self.models.iter().enumerate() {
            let used = self.leases.values().filter(|used| used.0 == slot).count();
            assert!(used <= model.spec.parallel, "{used} leases on {slot}");
        }
    }
}

/// As if all of it were measured.
pub(crate) fn measured(bytes: u64) -> Footprint {
    Footprint { file_backed: Bytes::ZERO, anonymous: Some(Bytes(bytes)), exact: true }
}

fn take(list: &mut Vec<SlotId>, slot: SlotId) {
    let at =
        list.iter().position(|entry| *entry == slot).unwrap_or_else(|| panic!("{slot:?} is not under way"));
    list.remove(at);
}

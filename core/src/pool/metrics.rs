use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

use super::SlotEntry;
use crate::backend::{Breaker, ServedBy};
use crate::error::Error;
use crate::failure::FailureKind;
use crate::memory::{Estimate, Footprint, SystemMemory};
use crate::request::Completion;
use crate::scheduler::{Cause, Change, Limits, Phase, SlotId};
use crate::units::{Bytes, ModelName};

/// The pool's metrics, registered once. Labels are the configured models and places and fixed words.
pub(super) struct Metrics {
    budget: Gauge,
    used: Gauge,
    headroom: Gauge,
    limit: Gauge,
    system_total: Gauge,
    system_available: Gauge,
    process: Gauge,
    llms: Gauge,
    queue_depth: Gauge,
    queue_oldest: Gauge,
    slots: Vec<SlotMetrics>,
    models: BTreeMap<ModelName, Arc<ModelMetrics>>,
}

/// What is counted for each slot.
struct SlotMetrics {
    model: String,
    place: String,
    reserved: Gauge,
    estimated: Gauge,
    /// Of weights, keys and values, compute buffers, projector, the rest.
    estimated_kinds: [Gauge; 5],
    file_backed: Gauge,
    anonymous: Gauge,
    load_seconds: Histogram,
    shortfall: Counter,
}

/// What is counted for each model's answers.
pub(super) struct ModelMetrics {
    pub(super) ttft: Histogram,
    pub(super) inter_token: Histogram,
    pub(super) cancellations: Counter,
    pub(super) failures: Counter,
    answers: Counter,
    prompt_tokens: Counter,
    completion_tokens: Counter,
}

impl Metrics {
    pub(super) fn new(limits: &Limits, slots: &[SlotEntry]) -> Self {
        describe();
        let models =
            slots.iter().map(|slot| (slot.model.clone(), Arc::new(ModelMetrics::new(&slot.model)))).collect();
        let metrics = Self {
            budget: gauge!("sarai_budget_bytes"),
            used: gauge!("sarai_used_bytes"),
            headroom: gauge!("sarai_headroom_bytes"),
            limit: gauge!("sarai_limit_bytes"),
            system_total: gauge!("sarai_system_total_bytes"),
            system_available: gauge!("sarai_system_available_bytes"),
            process: gauge!("sarai_process_resident_bytes"),
            llms: gauge!("sarai_llms_loaded"),
            queue_depth: gauge!("sarai_queue_depth"),
            queue_oldest: gauge!("sarai_queue_oldest_seconds"),
            slots: slots.iter().map(SlotMetrics::new).collect(),
            models,
        };
        let left = limits.budget.saturating_sub(limits.spare);
        metrics.set_ledger(limits.budget, limits.budget, Bytes::ZERO, left);
        metrics
    }

    pub(super) fn of_model(&self, model: &ModelName) -> Arc<ModelMetrics> {
        // Every model of a pool has a slot or falls back to one; the latter are counted under their own name.
        self.models.get(model).cloned().unwrap_or_else(|| Arc::new(ModelMetrics::new(model)))
    }

    /// A slot moved: its gauges, the ledger's, and the counters of loads and evictions.
    pub(super) fn on_change(&self, change: &Change) {
        self.set_ledger(change.budget, change.limit, change.used, change.left);
        self.llms.set(change.llms as f64);
        self.slots[change.slot.0].on_change(change);
    }

    /// The ledger holds more for a slot than before.
    pub(super) fn on_settled(&self, change: &Change) {
        self.set_ledger(change.budget, change.limit, change.used, change.left);
        self.slots[change.slot.0].show(change);
    }

    pub(super) fn set_ledger(&self, budget: Bytes, limit: Bytes, used: Bytes, left: Bytes) {
        self.budget.set(budget.0 as f64);
        self.limit.set(limit.0 as f64);
        self.used.set(used.0 as f64);
        self.headroom.set(left.0 as f64);
    }

    /// An unload did not give so much back.
    pub(super) fn on_shortfall(&self, slot: SlotId, missing: Bytes) {
        self.slots[slot.0].shortfall.increment(missing.0);
    }

    /// The machine's memory was looked at.
    pub(super) fn on_memory(&self, memory: &SystemMemory) {
        self.system_total.set(memory.total.0 as f64);
        self.system_available.set(memory.available.0 as f64);
        self.process.set(memory.process.0 as f64);
    }

    pub(super) fn on_queue(&self, waiting: usize, oldest: Option<Duration>) {
        self.queue_depth.set(waiting as f64);
        self.queue_oldest.set(oldest.unwrap_or_default().as_secs_f64());
    }

    pub(super) fn on_reject(&self, error: &Error) {
        let reason = match error {
            Error::OverBudget { .. } => "over_budget",
            Error::TooManyLlms { .. } => "too_many_llms",
            Error::QueueFull { .. } => "queue_full",
            Error::WaitTimeout { .. } => "timeout",
            Error::Load { .. } => "load_failed",
            Error::LoadBackoff { .. } => "load_backoff",
            Error::Unsupported { .. } => "unsupported",
            _ => "other",
        };
        counter!("sarai_rejections_total", "reason" => reason).increment(1);
    }

    /// A host is given up for a model, or asked again.
    pub(super) fn on_breaker(&self, model: &ModelName, host: &ServedBy, breaker: Breaker) {
        gauge!("sarai_breaker_state", "model" => model.to_string(), "host" => host.to_string())
            .set(breaker_number(breaker));
    }

    pub(super) fn on_fallback(
        &self,
        model: &ModelName,
        from: &ServedBy,
        to: &ServedBy,
        reason: &'static str,
    ) {
        counter!(
            "sarai_fallbacks_total",
            "model" => model.to_string(), "from" => from.to_string(), "to" => to.to_string(),
            "reason" => reason
        )
        .increment(1);
    }
}

/// A breaker's state as a number.
const fn breaker_number(breaker: Breaker) -> f64 {
    match breaker {
        Breaker::Closed => 0.0,
        Breaker::HalfOpen => 1.0,
        Breaker::Open => 2.0,
    }
}

impl SlotMetrics {
    fn new(slot: &SlotEntry) -> Self {
        let (model, place) = (slot.model.to_string(), slot.backend.served_by().to_string());
        let bytes = |kind: &'static str| gauge!("sarai_model_bytes", "model" => model.clone(), "place" => place.clone(), "kind" => kind);
        Self {
            reserved: bytes("reserved"),
            estimated: bytes("estimated"),
            estimated_kinds: ["weights", "kv", "compute", "projector", "overhead"].map(|kind| {
                gauge!("sarai_model_estimated_bytes", "model" => model.clone(), "place" => place.clone(), "kind" => kind)
            }),
            file_backed: bytes("file_backed"),
            anonymous: bytes("anonymous"),
            shortfall: counter!("sarai_unload_shortfall_bytes_total", "model" => model.clone(), "place" => place.clone()),
            load_seconds: histogram!("sarai_load_seconds", "model" => model.clone(), "place" => place.clone()),
            model,
            place,
        }
    }

    fn show(&self, change: &Change) {
        self.reserved.set(change.bytes.0 as f64);
        let estimate = change.estimate.clone().unwrap_or_default();
        self.estimated.set(estimate.total().0 as f64);
        let Estimate { weights, kv, compute, projector, overhead, .. } = estimate;
        for (gauge, bytes) in self.estimated_kinds.iter().zip([weights, kv, compute, projector, overhead]) {
            gauge.set(bytes.0 as f64);
        }
        let measured = change.measured.unwrap_or(Footprint::NONE);
        self.file_backed.set(measured.file_backed.0 as f64);
        // Not a number: what is not known must not look like zero.
        self.anonymous.set(measured.anonymous.map_or(f64::NAN, |bytes| bytes.0 as f64));
    }

    fn on_change(&self, change: &Change) {
        self.show(change);
        match (change.from, change.to, change.cause) {
            (Phase::Loading, Phase::Ready, _) => {
                self.load_seconds.record(change.took);
                self.count_load("ok");
            }
            (Phase::Loading, Phase::Absent, Cause::Abandoned) => self.count_load("abandoned"),
            (Phase::Loading | Phase::Estimating, Phase::Absent, Cause::Failed) => self.count_load("failed"),
            (Phase::Ready, Phase::Unloading, cause) => {
                counter!(
                    "sarai_unloads_total",
                    "model" => self.model.clone(), "place" => self.place.clone(), "reason" => cause.as_str()
                )
                .increment(1);
            }
            (Phase::Ready, Phase::Resizing, cause) => {
                counter!(
                    "sarai_context_changes_total",
                    "model" => self.model.clone(), "place" => self.place.clone(), "reason" => cause.as_str()
                )
                .increment(1);
            }
            _ => {}
        }
    }

    fn count_load(&self, outcome: &'static str) {
        counter!(
            "sarai_loads_total",
            "model" => self.model.clone(), "place" => self.place.clone(), "outcome" => outcome
        )
        .increment(1);
    }
}

impl ModelMetrics {
    fn new(model: &ModelName) -> Self {
        let model = || model.to_string();
        let tokens = |kind: &'static str| counter!("sarai_tokens_total", "model" => model(), "kind" => kind);
        Self {
            ttft: histogram!("sarai_ttft_seconds", "model" => model()),
            inter_token: histogram!("sarai_inter_token_seconds", "model" => model()),
            cancellations: counter!("sarai_cancellations_total", "model" => model()),
            failures: counter!("sarai_answers_total", "model" => model(), "outcome" => "failed"),
            answers: counter!("sarai_answers_total", "model" => model(), "outcome" => "ok"),
            prompt_tokens: tokens("prompt"),
            completion_tokens: tokens("completion"),
        }
    }

    pub(super) fn on_done(&self, completion: &Completion) {
        self.answers.increment(1);
        self.prompt_tokens.increment(completion.prompt_tokens.unwrap_or(0).into());
        self.completion_tokens.increment(completion.completion_tokens.unwrap_or(0).into());
    }
}

/// Why a place failed, as a label.
pub(super) fn fallback_reason(error: &Error) -> &'static str {
    match error {
        Error::Request { cause, .. } | Error::Load { cause, .. } | Error::LoadBackoff { cause, .. } => {
            FailureKind::as_str(cause.kind)
        }
        Error::OverBudget { .. } => "over_budget",
        _ => "other",
    }
}

fn describe() {
    describe_gauge!("sarai_budget_bytes", Unit::Bytes, "Memory this process may hold for models");
    describe_gauge!(
        "sarai_limit_bytes",
        Unit::Bytes,
        "What models may hold just now: the budget, or what the machine has memory for"
    );
    describe_gauge!(
        "sarai_system_total_bytes",
        Unit::Bytes,
        "The machine's memory, or its control group's limit"
    );
    describe_gauge!("sarai_system_available_bytes", Unit::Bytes, "What of it could be had");
    describe_gauge!("sarai_process_resident_bytes", Unit::Bytes, "What this process holds");
    describe_gauge!("sarai_used_bytes", Unit::Bytes, "What the ledger holds for models");
    describe_gauge!("sarai_headroom_bytes", Unit::Bytes, "What loads may still take of the limit");
    describe_gauge!("sarai_llms_loaded", "LLMs loaded or loading, remote ones included");
    describe_gauge!("sarai_queue_depth", "Requests that wait for their model");
    describe_gauge!("sarai_queue_oldest_seconds", Unit::Seconds, "How long the oldest of them has waited");
    describe_gauge!(
        "sarai_model_bytes",
        Unit::Bytes,
        "Bytes of a model, by kind; measured at its load and while its steps touched buffers for the first time"
    );
    describe_gauge!("sarai_model_estimated_bytes", Unit::Bytes, "What a model is estimated to take, by kind");
    describe_counter!(
        "sarai_unload_shortfall_bytes_total",
        Unit::Bytes,
        "What unloads did not give back, where that was more than a twentieth"
    );
    describe_gauge!(
        "sarai_breaker_state",
        "Whether a host is asked for a model: 0 closed (it is), 1 half open, 2 open (it is left alone)"
    );
    describe_histogram!("sarai_load_seconds", Unit::Seconds, "Duration of successful loads");
    describe_histogram!("sarai_ttft_seconds", Unit::Seconds, "From a ready model to the first text");
    describe_histogram!("sarai_inter_token_seconds", Unit::Seconds, "Between pieces of text");
    describe_counter!("sarai_loads_total", "Loads by outcome");
    describe_counter!("sarai_unloads_total", "Unloads by reason");
    describe_counter!("sarai_context_changes_total", "Contexts made shorter or longer, by reason");
    describe_counter!("sarai_answers_total", "Answers by outcome");
    describe_counter!("sarai_tokens_total", "Tokens by kind");
    describe_counter!("sarai_cancellations_total", "Answers that their caller dropped");
    describe_counter!("sarai_fallbacks_total", "Requests that went on to another place");
    describe_counter!("sarai_rejections_total", "Requests that were not served, by reason");
}

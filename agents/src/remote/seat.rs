use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sarai_core::backend::{HostChange, HostReport, HostState, ServedBy};
use sarai_core::failure::{Failure, FailureKind};
use tokio::time::Instant;

use super::api::HostApi;
use super::breaker::{Admission, Breaker};
use crate::Error;
use crate::error::Stage;

/// How long a host may take to say what it has, for an error that names it.
const EXPLANATION: Duration = Duration::from_secs(1);

/// One model on one host.
pub(super) struct Seat {
    pub(super) api: Arc<dyn HostApi>,
    pub(super) model: String,
    breaker: Mutex<Breaker>,
    /// Who hears of the breaker; nobody before the first load.
    report: Mutex<Option<HostReport>>,
}

impl Seat {
    pub(super) fn new(api: Arc<dyn HostApi>, model: String) -> Self {
        Self { api, model, breaker: Mutex::default(), report: Mutex::new(None) }
    }

    pub(super) fn served_by(&self) -> ServedBy {
        self.api.served_by()
    }

    pub(super) fn report_to(&self, report: HostReport) {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }

    /// Requests that run on the host.
    pub(super) fn in_flight(&self) -> usize {
        self.api.parallel().saturating_sub(self.api.places().available_permits())
    }

    pub(super) fn is_full(&self) -> bool {
        self.api.places().available_permits() == 0
    }

    pub(super) fn admission(&self, now: Instant) -> Admission {
        self.breaker().admission(now)
    }

    pub(super) fn is_suspect(&self, now: Instant) -> bool {
        self.breaker().is_suspect(now)
    }

    /// Why it is left alone; the host's own word where there is one.
    pub(super) fn left_alone(&self, now: Instant) -> Failure {
        let breaker = self.breaker();
        let pause = match breaker.admission(now) {
            Admission::Not(Some(until)) => format!(" for {:.1} s more", (until - now).as_secs_f64()),
            Admission::Not(None) | Admission::Free | Admission::Probe => String::new(),
        };
        match breaker.cause() {
            Some(cause) => Failure::new(cause.kind, format!("left alone{pause}, because it failed: {cause}")),
            None => Failure::new(FailureKind::Busy, format!("left alone{pause}, because it is busy")),
        }
    }

    pub(super) fn state(&self, now: Instant) -> HostState {
        let breaker = self.breaker();
        let asked_again = match breaker.admission(now) {
            Admission::Not(Some(until)) => u64::try_from((until - now).as_millis()).ok(),
            Admission::Not(None) | Admission::Free | Admission::Probe => None,
        };
        HostState {
            host: self.served_by(),
            model: self.model.clone(),
            breaker: breaker.state(),
            asked_again_in_ms: asked_again,
            failure: breaker.cause().map(ToString::to_string),
            in_flight: self.in_flight(),
            parallel: self.api.parallel(),
            resident: self.api.resident(&self.model),
        }
    }

    /// A request is about to ask; what it finds out is told to what this returns.
    pub(super) fn begin(self: &Arc<Self>) -> Verdict {
        let mut probes = false;
        self.change(|breaker, now| {
            probes = breaker.begin(now);
            probes
        });
        Verdict { seat: Arc::clone(self), probes, told: false }
    }

    /// The same error with what the host has instead, where it does not have the model.
    pub(super) async fn explained(&self, error: Error) -> Error {
        let Error::Status { host, status: 404, message, .. } = error else { return error };
        let has = tokio::time::timeout(EXPLANATION, self.api.has()).await;
        let has = has.ok().and_then(Result::ok);
        let (has, get) = (has_instead(has.as_deref()), self.api.how_to_get(&self.model));
        Error::ModelMissing { host, message: format!("{message}; {has}{get}") }
    }

    /// Changes the breaker, and says so where that is a change of its state.
    fn change(&self, change: impl FnOnce(&mut Breaker, Instant) -> bool) {
        let (changed, breaker, cause) = {
            let mut breaker = self.breaker();
            let changed = change(&mut breaker, Instant::now());
            (changed, breaker.state(), breaker.cause().map(ToString::to_string))
        };
        if !changed {
            return;
        }
        let report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(report) = report {
            report(HostChange { host: self.served_by(), breaker, cause });
        }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        // Nothing panics while it is held.
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("api", &self.api).field("model", &self.model).finish_non_exhaustive()
    }
}

/// The beginning of a list of what a host has.
fn has_instead(has: Option<&[String]>) -> String {
    const SHOWN: usize = 5;
    match has {
        None => String::new(),
        Some([]) => "it has no model; ".to_owned(),
        Some(has) => {
            let more = if has.len() > SHOWN { ", ..." } else { "" };
            format!("it has {}{more}; ", has.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", "))
        }
    }
}

/// What a request finds out about its host. Dropped without a word, it has found out nothing.
#[derive(Debug)]
pub(super) struct Verdict {
    seat: Arc<Seat>,
    /// Whether it is to find out if the host answers again.
    probes: bool,
    told: bool,
}

impl Verdict {
    /// The host begins to answer.
    pub(super) fn answers(&mut self) {
        if !std::mem::replace(&mut self.told, true) {
            self.seat.change(|breaker, _| breaker.answers());
        }
    }

    /// The host has answered.
    pub(super) fn succeeded(&mut self) {
        self.told = true;
        self.seat.change(|breaker, _| breaker.succeeded());
    }

    /// The request failed, before or after the host had begun to answer.
    pub(super) fn failed(&mut self, error: &Error) {
        match meaning(error) {
            Meaning::Broken => {
                let cause = Failure::new(error.kind(), error.to_string());
                self.seat.change(|breaker, now| breaker.failed(cause, now));
            }
            Meaning::Busy(pause) => self.seat.change(|breaker, now| breaker.busy(pause, now)),
            // It lives, whatever it thinks of the request.
            Meaning::Lives => self.succeeded(),
            Meaning::Nothing => return,
        }
        self.told = true;
    }
}

impl Drop for Verdict {
    fn drop(&mut self) {
        if self.probes && !self.told {
            self.seat.change(Breaker::abandoned);
        }
    }
}

/// What an error says about its host.
enum Meaning {
    /// It does not work.
    Broken,
    /// It has too much to do.
    Busy(Option<Duration>),
    /// It works: the request was at fault, or who made it.
    Lives,
    /// Nothing.
    Nothing,
}

fn meaning(error: &Error) -> Meaning {
    match error {
        Error::Connect { .. }
        | Error::CutOff { .. }
        | Error::HostReported { .. }
        | Error::Protocol { .. }
        | Error::Deadline { stage: Stage::FirstToken | Stage::Stall, .. } => Meaning::Broken,
        Error::Status { status: 429 | 503, retry_after, .. } => Meaning::Busy(*retry_after),
        // 501: it does not have the path.
        Error::Status { status: 400..=499 | 501, .. } | Error::ModelMissing { .. } => Meaning::Lives,
        Error::Status { .. } => Meaning::Broken,
        // An answer that was too long for its deadline, a request that was never sent.
        _ => Meaning::Nothing,
    }
}

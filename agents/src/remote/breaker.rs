//! When a host is left alone for a model. Pure: time comes in with each call.

use std::time::Duration;

use sarai_core::backend;
use sarai_core::failure::Failure;
use tokio::time::Instant;

/// Failures in a row that open it.
const FAILURES: u32 = 3;
/// How long it stays open the first time; twice as long each time that the host, asked again, fails again.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_mins(2);

/// The breaker of one model on one host.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    state: State,
    /// Failures since the last whole answer, and the time of the last.
    failures: u32,
    failed_at: Option<Instant>,
    /// Times that it opened since the last success.
    opened: u32,
    /// The last failure since the last success.
    cause: Option<Failure>,
    /// Until when the host has said that it is busy.
    busy_until: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    /// Nothing is asked until then.
    Open(Instant),
    /// One request finds out.
    HalfOpen,
}

/// What a request may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// It may ask.
    Free,
    /// It may ask, and finds out whether the host answers again.
    Probe,
    /// It had better not, before that time where one is known.
    Not(Option<Instant>),
}

impl Breaker {
    pub(super) fn admission(&self, now: Instant) -> Admission {
        if let Some(until) = self.busy_until.filter(|until| *until > now) {
            return Admission::Not(Some(until));
        }
        match self.state {
            State::Closed => Admission::Free,
            State::Open(until) if until > now => Admission::Not(Some(until)),
            State::Open(_) => Admission::Probe,
            State::HalfOpen => Admission::Not(None),
        }
    }

    /// A request is about to ask. Returns whether that changed the state.
    pub(super) fn begin(&mut self, now: Instant) -> bool {
        let probes = self.admission(now) == Admission::Probe;
        if probes {
            self.state = State::HalfOpen;
        }
        probes
    }

    /// The host has begun to answer: it is asked again, but one that then fails is soon left alone again. Returns whether that
    /// changed the state.
    pub(super) fn answers(&mut self) -> bool {
        let changed = self.state != State::Closed;
        self.state = State::Closed;
        self.failures = self.failures.min(FAILURES - 1);
        changed
    }

    /// The host has answered. Returns whether that changed the state.
    pub(super) fn succeeded(&mut self) -> bool {
        let changed = self.state != State::Closed;
        *self = Self { busy_until: self.busy_until, ..Self::default() };
        changed
    }

    /// The host has failed. Returns whether that changed the state.
    pub(super) fn failed(&mut self, cause: Failure, now: Instant) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.failed_at = Some(now);
        self.cause = Some(cause);
        let opens = match self.state {
            State::Closed => self.failures >= FAILURES,
            State::HalfOpen => true,
            // A request of before, or one of last resort: nothing new.
            State::Open(_) => false,
        };
        if opens {
            let pause = FIRST_PAUSE.saturating_mul(1 << self.opened.min(10)).min(LONGEST_PAUSE);
            self.opened += 1;
            self.state = State::Open(now + pause);
        }
        opens
    }

    /// The host says that it has too much to do: that is no failure. A probe has found out what it wanted.
    pub(super) fn busy(&mut self, pause: Option<Duration>, now: Instant) -> bool {
        self.busy_until = pause.map(|pause| now + pause);
        let changed = self.state == State::HalfOpen;
        if changed {
            self.state = State::Closed;
        }
        changed
    }

    /// A request ended without telling anything. If it was the probe, another one may find out.
    pub(super) fn abandoned(&mut self, now: Instant) -> bool {
        let probe = self.state == State::HalfOpen;
        if probe {
            self.state = State::Open(now);
        }
        probe
    }

    /// Whether it has failed a moment ago.
    pub(super) fn is_suspect(&self, now: Instant) -> bool {
        self.failed_at.is_some_and(|at| now < at + FIRST_PAUSE)
    }

    pub(super) fn cause(&self) -> Option<&Failure> {
        self.cause.as_ref()
    }

    pub(super) fn state(&self) -> backend::Breaker {
        match self.state {
            State::Closed => backend::Breaker::Closed,
            State::HalfOpen => backend::Breaker::HalfOpen,
            State::Open(_) => backend::Breaker::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use sarai_core::failure::FailureKind;

    use super::*;

    fn failed(breaker: &mut Breaker, times: u32, now: Instant) -> bool {
        let refused = || Failure::new(FailureKind::Unreachable, "refused");
        (0..times).fold(false, |_, _| breaker.failed(refused(), now))
    }

    #[tokio::test(start_paused = true)]
    async fn three_failures_in_a_row_open_it_and_one_request_finds_out_whether_to_close_it() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        assert!(!failed(&mut breaker, 2, now) && breaker.admission(now) == Admission::Free);
        assert!(failed(&mut breaker, 1, now));
        assert_eq!(breaker.admission(now), Admission::Not(Some(now + FIRST_PAUSE)));
        let later = now + FIRST_PAUSE;
        assert_eq!(breaker.admission(later), Admission::Probe);
        assert!(breaker.begin(later));
        assert_eq!(breaker.admission(later), Admission::Not(None), "one at a time");
        assert!(breaker.succeeded());
        assert!(breaker.admission(later) == Admission::Free && breaker.cause().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_begins_to_answer_and_always_fails_then_is_left_alone_too() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..FAILURES {
            assert_eq!(breaker.admission(now), Admission::Free);
            breaker.answers();
            failed(&mut breaker, 1, now);
        }
        assert_ne!(breaker.admission(now), Admission::Free);
        let later = now + FIRST_PAUSE;
        breaker.begin(later);
        assert!(breaker.answers(), "it is asked again");
        assert!(failed(&mut breaker, 1, later), "and left alone at its next failure");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_forgotten_as_a_reason_to_ask_others_first() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        failed(&mut breaker, 1, now);
        assert!(breaker.is_suspect(now) && !breaker.is_suspect(now + FIRST_PAUSE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_between_failures_begins_the_count_anew() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..5 {
            failed(&mut breaker, 2, now);
            breaker.succeeded();
        }
        assert_eq!(breaker.admission(now), Admission::Free);
    }

    #[tokio::test(start_paused = true)]
    async fn each_probe_that_fails_doubles_the_pause_up_to_a_limit() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        failed(&mut breaker, FAILURES, now);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let Admission::Not(Some(until)) = breaker.admission(now) else { panic!("it is open") };
            pauses.push((until - now).as_secs());
            now = until;
            assert!(breaker.begin(now));
            assert!(failed(&mut breaker, 1, now));
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 120, 120]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_is_given_up_leaves_the_question_to_the_next_one() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        failed(&mut breaker, FAILURES, now);
        let later = now + FIRST_PAUSE;
        breaker.begin(later);
        assert!(breaker.abandoned(later));
        assert_eq!(breaker.admission(later), Admission::Probe);
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_host_is_not_broken_and_is_left_alone_for_as_long_as_it_says() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..9 {
            breaker.busy(Some(Duration::from_secs(7)), now);
        }
        assert_eq!(breaker.admission(now), Admission::Not(Some(now + Duration::from_secs(7))));
        assert_eq!(breaker.state(), backend::Breaker::Closed);
        assert_eq!(breaker.admission(now + Duration::from_secs(7)), Admission::Free);
        breaker.busy(Some(Duration::from_secs(7)), now);
        breaker.succeeded();
        assert_ne!(breaker.admission(now), Admission::Free, "an answer of before takes nothing back");
        breaker.busy(None, now);
        assert_eq!(breaker.admission(now), Admission::Free);
    }
}

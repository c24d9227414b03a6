//! How many tokens of prompts go into a step. Large steps read faster; small ones let others have their turn. So steps
//! are measured, and cut by time.

use std::time::Duration;

/// How long a step may take while others wait for its end: those who write, and those who want to begin.
const SHARED: Duration = Duration::from_millis(400);
/// How long it may take when there is one request alone. One that is dropped meanwhile does not wait, because a step can
/// be stopped; see [`Pace::gives_up`] for one that comes.
const ALONE: Duration = Duration::from_secs(2);
/// The same where a step can be given up for one that comes: in the half in which it is, nobody waits; in the other half no
/// longer than they would for the end of a step of [`ALONE`].
const ALONE_FOR_NOW: Duration = ALONE.saturating_mul(2);
/// Smaller steps than these are slow out of proportion: with repacked weights of a 10.7B file, steps of 128 tokens read at 0.90
/// of the speed of steps of 512, and those of 256 at 1.00. A newcomer waits for half of such a step at most.
const LEAST_SHARED: usize = 16;
const LEAST_ALONE: usize = 128;
const LEAST_ALONE_FOR_NOW: usize = 256;
/// A step for one request alone also takes what would be left of its prompt, where that is at most this fraction of it: small
/// steps are slow.
const SMALL_REST: usize = 4;
/// Before anything is measured.
const FIRST: usize = 32;

/// The pace of a model's steps.
#[derive(Debug)]
pub(super) struct Pace {
    most: usize,
    /// Whether a step can be given up: a recurrent state would be spoilt by that.
    can_give_up: bool,
    per_token: Option<Duration>,
    /// Whether the last step of a request alone was given up: the next one comes to its end, so that newcomers who come
    /// again and again do not keep a long prompt from being read.
    gave_up: bool,
}

impl Pace {
    /// For steps of at most so many tokens.
    pub(super) fn new(most: usize, can_give_up: bool) -> Self {
        Self { most, can_give_up, per_token: None, gave_up: false }
    }

    /// How many of the `pending` prompt tokens the next step may have, beside those of so many who write.
    pub(super) fn tokens(&self, pending: usize, alone: bool, writers: usize) -> usize {
        let most = self.most.saturating_sub(writers).max(1);
        let Some(per_token) = self.per_token.filter(|time| !time.is_zero()) else {
            return FIRST.min(most);
        };
        let (time, least) = match alone {
            true if self.can_give_up && !self.gave_up => (ALONE_FOR_NOW, LEAST_ALONE_FOR_NOW),
            true => (ALONE, LEAST_ALONE),
            false => (SHARED, LEAST_SHARED),
        };
        let fits = (time.as_secs_f64() / per_token.as_secs_f64()) as usize;
        let step = fits.saturating_sub(writers).max(least);
        let step = if alone && pending <= step + step / SMALL_REST { pending } else { step };
        step.min(most)
    }

    /// Whether a step of so many tokens, for one request alone, had better be given up for another request that comes
    /// when it has taken `so_far`: it is long, and less than half of it is lost.
    pub(super) fn gives_up(&self, tokens: usize, so_far: Duration) -> bool {
        let expected =
            self.per_token.unwrap_or_default().saturating_mul(u32::try_from(tokens).unwrap_or(u32::MAX));
        self.can_give_up && !self.gave_up && expected > ALONE && so_far < expected / 2
    }

    /// Notes that a step was given up.
    pub(super) fn gave_up(&mut self) {
        self.gave_up = true;
    }

    /// Notes a step that had `tokens` tokens of prompts in it and nothing much else; of one request alone, or of several. What it
    /// took is `None` where that says nothing about the next ones, because it touched buffers for the first time.
    pub(super) fn note(&mut self, tokens: usize, took: Option<Duration>, alone: bool) {
        self.gave_up &= !alone;
        let (Ok(count), Some(took)) = (u32::try_from(tokens), took) else { return };
        // What a small step takes for each token says little about a large one.
        if count < LEAST_SHARED as u32 {
            return;
        }
        let now = took / count;
        self.per_token = Some(self.per_token.map_or(now, |before| (before + now) / 2));
    }
}

/// Splits `budget` prompt tokens among sequences that have `pending` tokens left each: in equal parts, of which what one
/// does not need goes to the others. So a short prompt does not wait behind a long one.
pub(super) fn split(pending: &[usize], budget: usize) -> Vec<usize> {
    let mut parts = vec![0; pending.len()];
    let mut left = budget;
    let mut order: Vec<usize> = (0..pending.len()).collect();
    order.sort_by_key(|at| pending[*at]);
    for (done, at) in order.iter().enumerate() {
        let part = pending[*at].min(left.div_ceil(pending.len() - done));
        parts[*at] = part;
        left -= part;
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pending tokens of a long prompt.
    const MANY: usize = 10_000;

    #[test]
    fn steps_are_cut_by_time_and_smaller_while_others_wait() {
        let mut pace = Pace::new(512, true);
        let mut whole = Pace::new(512, false);
        assert_eq!(pace.tokens(MANY, true, 0), 32);
        // A model that reads 100 tokens a second.
        pace.note(32, Some(Duration::from_millis(320)), true);
        whole.note(32, Some(Duration::from_millis(320)), true);
        assert_eq!(
            (pace.tokens(MANY, true, 0), pace.tokens(MANY, false, 0), pace.tokens(MANY, false, 10)),
            (400, 40, 30)
        );
        assert_eq!((whole.tokens(MANY, true, 0), whole.tokens(MANY, false, 0)), (200, 40));
        assert!(pace.gives_up(400, Duration::from_secs(1)) && !whole.gives_up(400, Duration::from_secs(1)));
        // One that reads 20: as small as makes sense.
        (0..40).for_each(|_| pace.note(64, Some(Duration::from_millis(3200)), true));
        (0..40).for_each(|_| whole.note(64, Some(Duration::from_millis(3200)), true));
        assert_eq!(
            (pace.tokens(MANY, true, 0), pace.tokens(MANY, false, 0), pace.tokens(MANY, false, 15)),
            (256, 16, 16)
        );
        assert_eq!(whole.tokens(MANY, true, 0), 128);
        // 6.4 seconds, of which 3 or 4 have passed when somebody else comes.
        assert!(pace.gives_up(128, Duration::from_secs(3)) && !pace.gives_up(128, Duration::from_secs(4)));
        assert!(!pace.gives_up(30, Duration::ZERO), "that one will be over soon");
        // A fast one.
        (0..60).for_each(|_| pace.note(64, Some(Duration::from_millis(1)), true));
        assert_eq!(
            (pace.tokens(MANY, true, 0), pace.tokens(MANY, false, 0), pace.tokens(MANY, false, 10)),
            (512, 512, 502)
        );
    }

    #[test]
    fn a_small_rest_goes_along_where_nobody_waits() {
        let mut pace = Pace::new(512, true);
        pace.note(32, Some(Duration::from_millis(320)), true);
        assert_eq!((pace.tokens(500, true, 0), pace.tokens(501, true, 0)), (500, 400));
        assert_eq!(pace.tokens(45, false, 0), 40, "others wait");
        assert_eq!(pace.tokens(3, true, 0), 3);
    }

    #[test]
    fn a_step_that_was_given_up_comes_to_its_end_the_next_time() {
        let mut pace = Pace::new(512, true);
        let slow = |pace: &mut Pace, alone| pace.note(64, Some(Duration::from_millis(3200)), alone);
        slow(&mut pace, true);
        assert!(pace.gives_up(128, Duration::ZERO));
        pace.gave_up();
        assert_eq!(pace.tokens(MANY, true, 0), 128, "the next one comes to its end, so it is shorter");
        // The newcomer's steps do not count: they were short.
        slow(&mut pace, false);
        assert!(!pace.gives_up(128, Duration::ZERO));
        slow(&mut pace, true);
        assert!(pace.gives_up(128, Duration::ZERO));
    }

    #[test]
    fn a_short_prompt_goes_in_whole_beside_a_long_one() {
        assert_eq!(split(&[4000, 10], 64), [54, 10]);
        assert_eq!(split(&[4000, 4000, 5], 65), [30, 30, 5]);
        assert_eq!(split(&[3, 4], 64), [3, 4]);
        assert_eq!(split(&[9, 9], 0), [0, 0]);
    }

    proptest! {
        #[test]
        fn parts_never_exceed_what_is_pending_or_the_budget_and_leave_nothing_unused(
            pending in prop::collection::vec(1..300_usize, 0..9), budget in 0..600_usize
        ) {
            let parts = split(&pending, budget);
            prop_assert!(parts.iter().zip(&pending).all(|(part, pending)| part <= pending));
            prop_assert_eq!(parts.iter().sum::<usize>(), budget.min(pending.iter().sum()));
        }
    }
}

//! `tones:`: how `modulate` says things.

use std::collections::BTreeMap;

use super::at::At;
use super::check::Check;
use super::field::Field;
use super::pipelines::sampling;
use super::raw::RawTone;
use crate::tone::{Tone, Tones};

/// Checks all tones.
pub(super) fn tones(
    raw: Field<BTreeMap<String, Field<RawTone>>>,
    at: &At<'_>,
    check: &mut Check<'_>,
) -> Tones {
    let mut own = BTreeMap::new();
    for (name, field) in check.read(at, raw).unwrap_or_default() {
        let at = at.key(&name);
        check.require(&at, !name.trim().is_empty(), "a tone needs a name");
        let tone = check.read(&at, field).unwrap_or_default();
        own.extend(self::tone(tone, &at, check).map(|tone| (name, tone)));
    }
    Tones::new(own)
}

fn tone(raw: RawTone, at: &At<'_>, check: &mut Check<'_>) -> Option<Tone> {
    let description = check.optional(&at.key("description"), raw.description);
    let prompt = check.optional(&at.key("prompt"), raw.prompt);
    let sampling = sampling(raw.sampling, &at.key("sampling"), check);
    let whole = check.setting(&at.key("whole"), raw.whole, false);
    let tone = match (description, prompt) {
        (Some(description), None) => Tone::described(&description),
        (None, Some(prompt)) => Tone { prompt, ..Tone::described("") },
        (Some(_), Some(_)) => {
            check.problem(&at.key("prompt"), "not beside `description`: it is the whole instruction");
            return None;
        }
        (None, None) => {
            check.problem(at, "needs a `description` of how it sounds, or a `prompt`");
            return None;
        }
    };
    Some(Tone { sampling, whole, ..tone })
}

//! Where a recording is silent, and where a long one is cut.

use std::ops::Range;
use std::time::Duration;

use crate::Error;

/// Below this a frame is silent: -60 dB of full scale, by its root mean square. A quiet room recorded by a good microphone is
/// below it, speech that anybody would transcribe is not.
const SILENCE: f32 = 0.001;
/// What loudness is taken of: a syllable has several.
const FRAME: Duration = Duration::from_millis(20);
/// How long a pause is looked for, to cut in its middle.
const PAUSE: Duration = Duration::from_millis(200);
/// In which last part of a window the cut is sought.
const LAST: usize = 4;

/// The parts of a recording that are put to a model one by one: none longer than `longest`, cut at the quietest place in the
/// last quarter, in order. Parts that are silent are left out: models make words up for silence.
pub(crate) fn windows(samples: &[f32], rate: u32, longest: Duration) -> Result<Vec<Range<usize>>, Error> {
    let mut windows = cut(samples, rate, longest);
    windows.retain(|window| !is_silent(&samples[window.clone()], rate));
    if windows.is_empty() { Err(Error::SilentAudio) } else { Ok(windows) }
}

/// Cuts a recording into parts that are no longer than `longest`; together they are all of it.
fn cut(samples: &[f32], rate: u32, longest: Duration) -> Vec<Range<usize>> {
    let longest = in_samples(longest, rate);
    let mut windows = Vec::new();
    let mut start = 0;
    while samples.len() - start > longest {
        let end = quietest(samples, start + longest - longest / LAST..start + longest, rate);
        windows.push(start..end);
        start = end;
    }
    if start < samples.len() {
        windows.push(start..samples.len());
    }
    windows
}

/// The middle of the quietest pause in a range.
fn quietest(samples: &[f32], within: Range<usize>, rate: u32) -> usize {
    let (frame, frames) = (in_samples(FRAME, rate), PAUSE.as_millis().div_ceil(FRAME.as_millis()) as usize);
    let energies: Vec<f32> = samples[within.clone()].chunks(frame).map(energy).collect();
    let quiet = energies.windows(frames).map(|pause| pause.iter().sum::<f32>());
    let best = quiet.enumerate().min_by(|(_, one), (_, other)| one.total_cmp(other));
    // A range that is shorter than a pause is cut at its end.
    best.map_or(within.end, |(at, _)| (within.start + (at + frames / 2) * frame).min(within.end))
}

/// Whether no frame of it is loud enough to be heard.
fn is_silent(samples: &[f32], rate: u32) -> bool {
    samples.chunks(in_samples(FRAME, rate)).all(|frame| energy(frame) < SILENCE * SILENCE)
}

/// The mean square of samples.
fn energy(samples: &[f32]) -> f32 {
    samples.iter().map(|sample| sample * sample).sum::<f32>() / samples.len().max(1) as f32
}

fn in_samples(time: Duration, rate: u32) -> usize {
    ((time.as_secs_f64() * f64::from(rate)) as usize).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: u32 = 1000;

    /// Seconds of loudness one after another.
    fn sound(parts: &[(f32, f32)]) -> Vec<f32> {
        let part = |(seconds, loud): &(f32, f32)| {
            let loud = *loud;
            (0..(seconds * RATE as f32) as usize).map(move |n| if n % 2 == 0 { loud } else { -loud })
        };
        parts.iter().flat_map(part).collect()
    }

    #[test]
    fn a_long_recording_is_cut_in_its_pauses() {
        let samples = sound(&[(8.5, 0.3), (0.5, 0.0), (9.0, 0.3), (0.4, 0.01), (3.0, 0.3)]);
        let windows = windows(&samples, RATE, Duration::from_secs(10)).unwrap();
        let ends: Vec<f32> = windows.iter().map(|window| window.end as f32 / RATE as f32).collect();
        assert_eq!(ends.len(), 3);
        assert!((8.5..9.0).contains(&ends[0]) && (18.0..18.4).contains(&ends[1]), "{ends:?}");
        assert!((ends[2] - 21.4).abs() < 0.001);
    }

    #[test]
    fn silence_is_left_out_and_silence_alone_is_an_error() {
        let samples = sound(&[(9.9, 0.3), (30.0, 0.0), (5.0, 0.3)]);
        let heard = windows(&samples, RATE, Duration::from_secs(10)).unwrap();
        let seconds: usize = heard.iter().map(ExactSizeIterator::len).sum::<usize>() / RATE as usize;
        assert!((15..35).contains(&seconds), "{heard:?}");
        for silent in [sound(&[(5.0, 0.0)]), sound(&[(25.0, 0.0005)])] {
            let error = windows(&silent, RATE, Duration::from_secs(10)).unwrap_err();
            assert!(matches!(error, Error::SilentAudio));
        }
        // A click in it is a sound.
        let mut click = sound(&[(5.0, 0.0)]);
        click[2000..2020].fill(0.5);
        assert_eq!(windows(&click, RATE, Duration::from_secs(10)).unwrap().len(), 1);
    }

    proptest! {
        #[test]
        fn the_parts_are_all_of_it_in_order_and_none_is_too_long(
            parts in prop::collection::vec((0.0..4.0_f32, 0.0..1.0_f32), 0..12), longest in 500..5000_u64
        ) {
            let samples = sound(&parts);
            let longest = Duration::from_millis(longest);
            let cut = cut(&samples, RATE, longest);
            let mut at = 0;
            for window in &cut {
                prop_assert_eq!(window.start, at);
                prop_assert!(!window.is_empty() && window.len() <= in_samples(longest, RATE));
                at = window.end;
            }
            prop_assert_eq!(at, samples.len());
        }
    }
}

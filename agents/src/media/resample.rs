//! Another rate, block by block, so that no more than the result is held.

use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Indexing, Resampler as _};

use crate::Error;

/// Samples that are changed at once: the library's own advice is some hundreds to some thousands.
const BLOCK: usize = 1024;

/// Changes the rate of one channel.
pub(super) struct Resampler {
    from: u32,
    to: u32,
    /// `None` where the rates are the same.
    fft: Option<Fft<f32>>,
    /// What is no whole block yet.
    pending: Vec<f32>,
    block: Vec<f32>,
    made: Vec<f32>,
    taken: u64,
}

impl Resampler {
    pub(super) fn new(from: u32, to: u32) -> Result<Self, Error> {
        let fft = (from != to)
            .then(|| Fft::new(from as usize, to as usize, BLOCK, 1, FixedSync::Input))
            .transpose()
            .map_err(failed)?;
        let block = vec![0.0; fft.as_ref().map_or(0, |fft| fft.output_frames_max())];
        Ok(Self { from, to, fft, pending: Vec::new(), block, made: Vec::new(), taken: 0 })
    }

    /// The rate of what it takes.
    pub(super) fn from(&self) -> u32 {
        self.from
    }

    /// Samples that it has taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    pub(super) fn push(&mut self, samples: &[f32]) -> Result<(), Error> {
        self.taken += samples.len() as u64;
        if self.fft.is_none() {
            self.made.extend_from_slice(samples);
            return Ok(());
        }
        self.pending.extend_from_slice(samples);
        let mut done = 0;
        while let Some(fft) = &mut self.fft
            && self.pending.len() - done >= fft.input_frames_next()
        {
            done += step(fft, &self.pending[done..], None, &mut self.block, &mut self.made)?;
        }
        self.pending.drain(..done);
        Ok(())
    }

    /// All samples at the other rate: as many as the time of those taken has, and none late.
    pub(super) fn end(mut self) -> Result<Vec<f32>, Error> {
        let Some(mut fft) = self.fft.take() else { return Ok(self.made) };
        let length = (self.taken * u64::from(self.to)).div_ceil(u64::from(self.from));
        let (delay, length) = (fft.output_delay(), usize::try_from(length).map_err(failed)?);
        let (mut left, mut idle) = (Some(self.pending.len()), vec![0.0; fft.input_frames_next()]);
        idle[..self.pending.len()].copy_from_slice(&self.pending);
        // What was taken last comes out a block later.
        while self.made.len() < delay + length {
            step(&mut fft, &idle, left, &mut self.block, &mut self.made)?;
            (left, idle) = (Some(0), vec![0.0; fft.input_frames_next()]);
        }
        self.made.drain(..delay);
        self.made.truncate(length);
        Ok(self.made)
    }
}

/// One block: what is taken of `samples`, of which so many count.
fn step(
    fft: &mut Fft<f32>,
    samples: &[f32],
    count: Option<usize>,
    block: &mut [f32],
    made: &mut Vec<f32>,
) -> Result<usize, Error> {
    let frames = block.len();
    let input = InterleavedSlice::new(samples, 1, samples.len()).map_err(failed)?;
    let mut output = InterleavedSlice::new_mut(block, 1, frames).map_err(failed)?;
    let indexing = count.map(|count| Indexing::new().partial_len(count));
    let (taken, given) = fft.process_into_buffer(&input, &mut output, indexing.as_ref()).map_err(failed)?;
    made.extend_from_slice(&block[..given]);
    Ok(taken)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::BadAudio { reason: format!("its rate cannot be changed: {error}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_of_any_size_give_the_same_and_the_length_is_that_of_the_time(
            pieces in prop::collection::vec(0..3000_usize, 0..6), from in prop::sample::select(vec![8000_u32, 16_000, 44_100, 48_000, 11_025])
        ) {
            let samples: Vec<f32> = (0..pieces.iter().sum()).map(|n: usize| (n as f32 * 0.05).sin()).collect();
            let mut at_once = Resampler::new(from, 16_000).unwrap();
            at_once.push(&samples).unwrap();
            let mut in_pieces = Resampler::new(from, 16_000).unwrap();
            let mut rest = samples.as_slice();
            for piece in pieces {
                let (now, later) = rest.split_at(piece);
                in_pieces.push(now).unwrap();
                rest = later;
            }
            let (at_once, in_pieces) = (at_once.end().unwrap(), in_pieces.end().unwrap());
            prop_assert_eq!(at_once.len() as u64, (samples.len() as u64 * 16_000).div_ceil(u64::from(from)));
            prop_assert_eq!(at_once, in_pieces);
        }
    }

    #[test]
    fn nothing_comes_late() {
        // A step in the middle of a second stays in the middle.
        let samples: Vec<f32> = (0..48_000).map(|n| if n < 24_000 { 0.0 } else { 0.5 }).collect();
        let mut resampler = Resampler::new(48_000, 16_000).unwrap();
        resampler.push(&samples).unwrap();
        let made = resampler.end().unwrap();
        let at = made.iter().position(|sample| *sample > 0.25).unwrap();
        assert!(at.abs_diff(8000) <= 2, "{at}");
    }
}

//! What stands in a prompt for an image or audio.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use llama_cpp_2::token::LlamaToken;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A piece of what stands for an image or audio.
#[derive(Clone, Debug)]
pub(in super::super) enum Piece {
    /// Markers around it.
    Tokens(Vec<LlamaToken>),
    /// The projector's own words, which are no tokens.
    Embedded(Arc<Embedded>),
}

impl Piece {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Tokens(tokens) => size_of_val(tokens.as_slice()),
            Self::Embedded(embedded) => size_of_val(embedded.values.as_slice()),
        }
    }
}

/// Embeddings that stand for an image or a part of one, or for half a minute of audio.
pub(in super::super) struct Embedded {
    /// One row of `width` numbers after another.
    values: Vec<f32>,
    width: usize,
    /// Where each row stands in an image, where positions have four axes: in time, down, across and a fourth one. `None`
    /// where they stand one after another.
    grid: Option<Vec<[i32; 4]>>,
    /// Positions that they take together: in a grid fewer than there are rows.
    positions: usize,
    causal: bool,
    id: u64,
}

impl Embedded {
    /// `id` is the same for the same content through the same projector.
    pub(super) fn new(
        values: Vec<f32>,
        width: usize,
        grid: Option<Vec<[i32; 4]>>,
        positions: usize,
        causal: bool,
        id: u64,
    ) -> Self {
        Self { values, width, grid, positions, causal, id }
    }

    /// How many there are: as many cells of the context as they take.
    pub(in super::super) fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// Positions of the sequence that they take.
    pub(in super::super) fn positions(&self) -> usize {
        self.positions
    }

    /// Whether each attends to those before it alone, as tokens do. Otherwise all of them have to be in one step.
    pub(in super::super) fn is_causal(&self) -> bool {
        self.causal
    }

    pub(in super::super) fn rows(&self, part: Range<usize>) -> &[f32] {
        &self.values[part.start * self.width..part.end * self.width]
    }

    /// The position of the one at `at` along the four axes, where the first one's is `from`.
    pub(in super::super) fn axes(&self, at: usize, from: i32) -> [i32; 4] {
        match &self.grid {
            Some(grid) => {
                let [time, down, across, fourth] = grid[at];
                [from + time, from + down, from + across, fourth]
            }
            None => [from + i32::try_from(at).unwrap_or(i32::MAX); 4],
        }
    }

    /// Stand-ins in a list of tokens: below zero, so that no vocabulary has them, and the same for the same content at the
    /// same place alone. So two prompts have an image in common where these are equal, as with tokens.
    pub(in super::super) fn stand_ins(&self) -> impl Iterator<Item = LlamaToken> {
        (0..self.len() as u64).map(|at| stand_in(xxh3_64_with_seed(&at.to_le_bytes(), self.id)))
    }
}

/// From -2 down: llama.cpp has -1 for no token.
fn stand_in(hash: u64) -> LlamaToken {
    LlamaToken(-2 - (hash % (i32::MAX as u64 - 1)) as i32)
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedded")
            .field("len", &self.len())
            .field("positions", &self.positions)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(in crate::llama) mod tests {
    use super::*;

    /// Rows of one number each; in a grid of this width, where there is one.
    pub(in crate::llama) fn embedded(rows: usize, grid: Option<usize>, id: u64) -> Arc<Embedded> {
        let values = (0..rows).map(|row| row as f32).collect();
        let of =
            |width: usize| (0..rows).map(|at| [0, (at / width) as i32, (at % width) as i32, 0]).collect();
        let positions = grid.map_or(rows, |width| width.max(rows / width));
        Arc::new(Embedded::new(values, 1, grid.map(of), positions, true, id))
    }

    #[test]
    fn stand_ins_are_no_tokens_and_differ_by_content_and_place() {
        let all = |id| embedded(500, None, id).stand_ins().collect::<Vec<_>>();
        assert_eq!(all(1), all(1));
        assert!(all(1).iter().zip(all(2)).all(|(one, other)| *one != other));
        assert!(all(7).iter().all(|token| token.0 <= -2));
        assert!(all(1).windows(2).all(|pair| pair[0] != pair[1]));
        assert_eq!((stand_in(0).0, stand_in(i32::MAX as u64 - 2).0), (-2, -i32::MAX));
    }

    #[test]
    fn a_grid_has_one_time_for_all_and_a_row_has_one_after_another() {
        let image = embedded(6, Some(3), 1);
        assert_eq!((image.axes(0, 10), image.axes(5, 10)), ([10, 10, 10, 0], [10, 11, 12, 0]));
        assert_eq!((image.len(), image.positions()), (6, 3));
        assert_eq!(embedded(6, None, 1).axes(5, 10), [15; 4]);
        assert_eq!(image.rows(2..4), [2.0, 3.0]);
    }
}

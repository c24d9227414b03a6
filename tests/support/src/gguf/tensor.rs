//! Tensors, and how their rows are encoded.

use std::fmt;

use super::error::Error;
use super::k_quants::{self, q4_k, q6_k};
use super::quants::{self, f16_bits, q4_0, q8_0};
use super::random_blocks::RandomBlocks;

/// How a tensor's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, non_camel_case_types, reason = "the variants are ggml's own names")]
pub enum TensorType {
    F32,
    F16,
    Q4_0,
    Q8_0,
    Q4_K,
    Q6_K,
}

impl TensorType {
    /// The type's number in `ggml_type`.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q6_K => 14,
        }
    }

    /// The number in `llama_ftype` of a file whose large tensors are of this type.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            // llama_ftype names mixes: this one is Q4_K_S, which is nearly all Q4_K.
            Self::Q4_K => 14,
            Self::Q6_K => 18,
        }
    }

    /// The numbers in a block, and its bytes.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 => (1, 2),
            Self::Q4_0 => (quants::BLOCK, 18),
            Self::Q8_0 => (quants::BLOCK, 34),
            Self::Q4_K => (k_quants::BLOCK, 144),
            Self::Q6_K => (k_quants::BLOCK, 210),
        }
    }

    /// The bytes of a row of `n` numbers; none where `n` is no whole number of blocks.
    fn row_bytes(self, n: u64) -> Option<u64> {
        let (numbers, bytes) = self.block();
        n.is_multiple_of(numbers as u64).then_some(n / numbers as u64 * bytes as u64)
    }

    /// Appends `row`, quantised: 4 and 8 bits as ggml's reference quantisation does it, the K types to their largest
    /// numbers alone, without its search for better scales.
    pub(crate) fn encode(self, row: &[f32], out: &mut Vec<u8>) {
        let blocks = row.chunks_exact(self.block().0);
        match self {
            Self::F32 => row.iter().for_each(|x| out.extend(x.to_le_bytes())),
            Self::F16 => row.iter().for_each(|x| out.extend(f16_bits(*x).to_le_bytes())),
            Self::Q4_0 => blocks.for_each(|block| q4_0(block, out)),
            Self::Q8_0 => blocks.for_each(|block| q8_0(block, out)),
            Self::Q4_K => blocks.for_each(|block| q4_k(block, out)),
            Self::Q6_K => blocks.for_each(|block| q6_k(block, out)),
        }
    }
}

/// A named tensor whose rows are computed as they are written, so that a large one is never held.
pub struct Tensor {
    pub(crate) name: String,
    /// In ggml's order: the length of a row comes first.
    pub(crate) shape: Vec<u64>,
    pub(crate) kind: TensorType,
    fill: Fill,
}

type Numbers = Box<dyn Fn(u64, &mut [f32]) + Send + Sync>;

/// Where a row comes from, by its number, counted through all dimensions but the first.
enum Fill {
    /// Numbers, encoded afterwards.
    Numbers(Numbers),
    /// Encoded as it is.
    Blocks(RandomBlocks),
}

impl Tensor {
    /// A tensor of `shape`, the length of a row first; `fill` is called once for each row, in order, with its number.
    pub fn new(
        name: impl Into<String>,
        shape: impl Into<Vec<u64>>,
        kind: TensorType,
        fill: impl Fn(u64, &mut [f32]) + Send + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), shape: shape.into(), kind, fill: Fill::Numbers(Box::new(fill)) }
    }

    /// A tensor of random blocks, written as they are stored: many times as fast as numbers that are quantised. Its
    /// numbers have the mean 0 and about the standard deviation given. The first `silent` rows are zeros.
    pub fn random(
        name: impl Into<String>,
        shape: impl Into<Vec<u64>>,
        kind: TensorType,
        deviation: f32,
        silent: u64,
    ) -> Self {
        let name = name.into();
        let fill = Fill::Blocks(RandomBlocks::new(&name, kind, deviation, silent));
        Self { name, shape: shape.into(), kind, fill }
    }

    /// Its type.
    pub fn kind(&self) -> TensorType {
        self.kind
    }

    /// Its dimensions, the length of a row first.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Writes row `row` to `encoded`; `numbers` is scratch space.
    pub(crate) fn encode_row(&self, row: u64, numbers: &mut Vec<f32>, encoded: &mut Vec<u8>) {
        encoded.clear();
        match &self.fill {
            Fill::Numbers(fill) => {
                numbers.clear();
                numbers.resize(self.row_len() as usize, 0.0);
                fill(row, numbers);
                self.kind.encode(numbers, encoded);
            }
            Fill::Blocks(blocks) => blocks.put(row, self.row_len() as usize, encoded),
        }
    }

    pub(crate) fn row_len(&self) -> u64 {
        self.shape.first().copied().unwrap_or(0)
    }

    pub(crate) fn rows(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }

    pub(crate) fn bytes(&self) -> Result<u64, Error> {
        if self.shape.is_empty() || self.shape.len() > 4 || self.shape.contains(&0) {
            return Err(self.problem("it needs 1 to 4 dimensions, none of them 0"));
        }
        let row = self.kind.row_bytes(self.row_len()).ok_or_else(|| {
            let problem = format!(
                "rows of {} are no multiple of {}, the block of {:?}",
                self.row_len(),
                self.kind.block().0,
                self.kind
            );
            self.problem(problem)
        })?;
        row.checked_mul(self.rows()).ok_or_else(|| self.problem("its size overflows"))
    }

    pub(crate) fn problem(&self, problem: impl Into<String>) -> Error {
        Error::Tensor { name: self.name.clone(), problem: problem.into() }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, shape, kind, fill: _ } = self;
        f.debug_struct("Tensor")
            .field("name", name)
            .field("shape", shape)
            .field("kind", kind)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_no_whole_number_of_blocks_is_refused() {
        let tensor = Tensor::new("odd.weight", [33, 2], TensorType::Q8_0, |_, _| {});
        let error = tensor.bytes().unwrap_err().to_string();
        assert!(error.contains("odd.weight") && error.contains("33"), "{error}");
    }
}

//! Tensors, and how their rows are encoded.

use std::fmt;

use super::error::Error;

/// How a tensor's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are ggml's own names")]
pub enum TensorType {
    F32,
    F16,
    Q4_0,
    Q8_0,
}

/// Numbers that share a scale in ggml's Q4_0 and Q8_0.
const BLOCK: usize = 32;

impl TensorType {
    /// The type's number in `ggml_type`.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
        }
    }

    /// The number in `llama_ftype` of a file whose large tensors are of this type.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
        }
    }

    /// The bytes of a row of `n` numbers; none where `n` is no whole number of blocks.
    fn row_bytes(self, n: u64) -> Option<u64> {
        let blocks = n.is_multiple_of(BLOCK as u64).then_some(n / BLOCK as u64);
        match self {
            Self::F32 => Some(n * 4),
            Self::F16 => Some(n * 2),
            Self::Q4_0 => Some(blocks? * 18),
            Self::Q8_0 => Some(blocks? * 34),
        }
    }

    /// Appends `row`, quantised as ggml's reference quantisation does it.
    pub(crate) fn encode(self, row: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => row.iter().for_each(|x| out.extend(x.to_le_bytes())),
            Self::F16 => row.iter().for_each(|x| out.extend(f16_bits(*x).to_le_bytes())),
            Self::Q4_0 => row.chunks_exact(BLOCK).for_each(|block| q4_0(block, out)),
            Self::Q8_0 => row.chunks_exact(BLOCK).for_each(|block| q8_0(block, out)),
        }
    }
}

/// A named tensor whose rows are computed as they are written, so that a large one is never held.
pub struct Tensor {
    pub(crate) name: String,
    /// In ggml's order: the length of a row comes first.
    pub(crate) shape: Vec<u64>,
    pub(crate) kind: TensorType,
    pub(crate) fill: Fill,
}

/// Fills the row with the given number, counted through all dimensions but the first.
pub(crate) type Fill = Box<dyn Fn(u64, &mut [f32]) + Send + Sync>;

impl Tensor {
    /// A tensor of `shape`, the length of a row first; `fill` is called once for each row, in order, with its number.
    pub fn new(
        name: impl Into<String>,
        shape: impl Into<Vec<u64>>,
        kind: TensorType,
        fill: impl Fn(u64, &mut [f32]) + Send + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), shape: shape.into(), kind, fill: Box::new(fill) }
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
                "rows of {} are no multiple of {BLOCK}, the block of {:?}",
                self.row_len(),
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

/// ggml's `block_q8_0`: an f16 scale, then 32 signed bytes; a number is scale × byte.
fn q8_0(block: &[f32], out: &mut Vec<u8>) {
    let scale = block.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out.extend(f16_bits(scale).to_le_bytes());
    out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
}

/// ggml's `block_q4_0`: an f16 scale, then 16 bytes whose low nibbles are the first half of the block and whose high
/// nibbles are the second; a number is scale × (nibble - 8). The largest number takes the nibble 0, which reaches
/// further than 15 does.
fn q4_0(block: &[f32], out: &mut Vec<u8>) {
    let largest = block.iter().fold(0.0_f32, |max, x| if x.abs() > max.abs() { *x } else { max });
    let scale = largest / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let nibble = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    out.extend(f16_bits(scale).to_le_bytes());
    let (low, high) = block.split_at(BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(l, h)| nibble(*l) | nibble(*h) << 4));
}

/// IEEE 754 binary16, rounded to nearest, ties to even.
fn f16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    // 65520 and above round to infinity.
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    // Below 2^-14 a half is a multiple of 2^-24, and f32 rounds such a product exactly as asked.
    if magnitude < 0x3880_0000 {
        return sign | (f32::from_bits(magnitude) * 16_777_216.0).round_ties_even() as u16;
    }
    let odd = magnitude >> 13 & 1;
    let rounded = magnitude - (112 << 23) + 0xfff + odd;
    sign | (rounded >> 13) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_rounded_to_the_nearest_even() {
        for (x, bits) in [
            (0.0, 0),
            (-0.0, 0x8000),
            (1.0, 0x3c00),
            (-2.0, 0xc000),
            (65504.0, 0x7bff),
            (65519.0, 0x7bff),
            (65520.0, 0x7c00),
            (f32::INFINITY, 0x7c00),
            (1.0 + 1.0 / 2048.0, 0x3c00),
            (1.0 + 3.0 / 2048.0, 0x3c02),
            (2.0_f32.powi(-14), 0x0400),
            (2.0_f32.powi(-24), 1),
            (2.0_f32.powi(-25), 0),
            (3.0 * 2.0_f32.powi(-25), 2),
        ] {
            assert_eq!(f16_bits(x), bits, "{x}");
        }
        assert_eq!(f16_bits(f32::NAN) & 0x7c00, 0x7c00);
        assert_ne!(f16_bits(f32::NAN) & 0x03ff, 0);
    }

    #[test]
    fn eight_bit_blocks_come_back_within_half_a_step() {
        let block: Vec<f32> = (0..32).map(|i| (i as f32 - 13.0) * 0.25).collect();
        let mut bytes = Vec::new();
        TensorType::Q8_0.encode(&block, &mut bytes);
        assert_eq!(bytes.len(), 34);
        let scale = 18.0 * 0.25 / 127.0;
        for (x, q) in block.iter().zip(&bytes[2..]) {
            assert!((x - scale * f32::from(*q as i8)).abs() <= scale * 0.5001, "{x}");
        }
    }

    #[test]
    fn four_bit_blocks_keep_the_largest_number_and_the_order_of_the_halves() {
        let mut block = [0.0_f32; 32];
        block[0] = -8.0;
        block[1] = 3.0;
        block[16] = 7.0;
        let mut bytes = Vec::new();
        TensorType::Q4_0.encode(&block, &mut bytes);
        assert_eq!(bytes.len(), 18);
        assert_eq!(bytes[..2], 0x3c00_u16.to_le_bytes());
        assert_eq!(bytes[2], 15 << 4);
        assert_eq!(bytes[3], 8 << 4 | 11);
        assert_eq!(bytes[4], 8 << 4 | 8);
    }

    #[test]
    fn a_row_that_is_no_whole_number_of_blocks_is_refused() {
        let tensor = Tensor::new("odd.weight", [33, 2], TensorType::Q8_0, |_, _| {});
        let error = tensor.bytes().unwrap_err().to_string();
        assert!(error.contains("odd.weight") && error.contains("33"), "{error}");
    }
}

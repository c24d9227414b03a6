//! Rows of random blocks, written as they are stored.

use super::k_quants::packed;
use super::quants::f16_bits;
use super::random::Random;
use super::tensor::TensorType;

/// Random rows of one tensor. Every bit of the quantised numbers is by chance; the scales are chosen so that the numbers
/// have the mean 0 and the standard deviation asked for.
pub(crate) struct RandomBlocks {
    name: String,
    kind: TensorType,
    deviation: f32,
    silent: u64,
}

impl RandomBlocks {
    pub(crate) fn new(name: &str, kind: TensorType, deviation: f32, silent: u64) -> Self {
        Self { name: name.to_owned(), kind, deviation, silent }
    }

    /// Appends the row: `n` numbers, all zero for one of the silent rows.
    pub(crate) fn put(&self, row: u64, n: usize, out: &mut Vec<u8>) {
        let (numbers, bytes) = self.kind.block();
        let begin = out.len();
        out.resize(begin + n / numbers * bytes, 0);
        if row < self.silent {
            return;
        }
        let mut random = Random::new(0, &self.name, row);
        let row = &mut out[begin..];
        match self.kind {
            TensorType::F32 | TensorType::F16 => self.put_signs(&mut random, row),
            _ => {
                random.fill(row);
                row.chunks_exact_mut(bytes).for_each(|block| self.scale(&mut random, block));
            }
        }
    }

    /// Plain numbers: the deviation with a random sign.
    fn put_signs(&self, random: &mut Random, row: &mut [u8]) {
        let mut numbers = vec![0.0; row.len() / self.kind.block().1];
        random.add_signs(self.deviation, &mut numbers);
        let mut encoded = Vec::with_capacity(row.len());
        self.kind.encode(&numbers, &mut encoded);
        row.copy_from_slice(&encoded);
    }

    /// Puts the scales into a block of random bits.
    fn scale(&self, random: &mut Random, block: &mut [u8]) {
        // The standard deviations of a byte and of 4 and 6 bits, and the quadratic means of the sub-blocks' scales below.
        const BYTE: f32 = 73.9;
        const FOUR_BITS: f32 = 4.61;
        const SIX_BITS: f32 = 18.47;
        const Q4_K_SCALES: f32 = 20.0;
        const Q6_K_SCALES: f32 = 12.0;

        // Numbers from -8 to 7 and the like have the mean -0.5; a random sign of the scale takes it away.
        let bits = random.next();
        let sign = if bits & 1 == 0 { 1.0 } else { -1.0 };
        match self.kind {
            TensorType::Q8_0 => put_f16(sign * self.deviation / BYTE, &mut block[..2]),
            TensorType::Q4_0 => put_f16(sign * self.deviation / FOUR_BITS, &mut block[..2]),
            TensorType::Q4_K => {
                // With equal scales and minima, 7.5 times the scale is the middle of the nibbles.
                let d = self.deviation / FOUR_BITS / Q4_K_SCALES;
                put_f16(d, &mut block[..2]);
                put_f16(7.5 * d, &mut block[2..4]);
                let mut pairs = [(0, 0); 8];
                for (i, pair) in pairs.iter_mut().enumerate() {
                    let scale = 12 + (bits >> (4 * i) & 15) as u8;
                    *pair = (scale, scale);
                }
                block[4..16].copy_from_slice(&packed(&pairs));
            }
            TensorType::Q6_K => {
                for (i, scale) in block[192..208].iter_mut().enumerate() {
                    *scale = if bits >> i & 1 == 0 { Q6_K_SCALES as i8 } else { -Q6_K_SCALES as i8 } as u8;
                }
                put_f16(self.deviation / SIX_BITS / Q6_K_SCALES, &mut block[208..]);
            }
            TensorType::F32 | TensorType::F16 => {}
        }
    }
}

fn put_f16(x: f32, out: &mut [u8]) {
    out.copy_from_slice(&f16_bits(x).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::super::k_quants::tests::{from_q4_k, from_q6_k};
    use super::super::quants::tests::{from_q4_0, from_q8_0, half};
    use super::*;

    const DEVIATION: f32 = 0.02;

    #[test]
    fn the_numbers_have_the_mean_zero_and_the_deviation_asked_for() {
        type Decode = fn(&[u8]) -> Vec<f32>;
        let cases: [(TensorType, Decode); 6] = [
            (TensorType::F32, |b| vec![f32::from_le_bytes([b[0], b[1], b[2], b[3]])]),
            (TensorType::F16, |b| vec![half(b)]),
            (TensorType::Q4_0, from_q4_0),
            (TensorType::Q8_0, from_q8_0),
            (TensorType::Q4_K, from_q4_k),
            (TensorType::Q6_K, from_q6_k),
        ];
        for (kind, decode) in cases {
            let blocks = RandomBlocks::new("test", kind, DEVIATION, 1);
            let mut bytes = Vec::new();
            (1..9).for_each(|row| blocks.put(row, 4096, &mut bytes));
            let numbers: Vec<f32> = bytes.chunks_exact(kind.block().1).flat_map(decode).collect();
            assert_eq!(numbers.len(), 8 * 4096);
            let n = numbers.len() as f32;
            let mean = numbers.iter().sum::<f32>() / n;
            let deviation = (numbers.iter().map(|x| x * x).sum::<f32>() / n).sqrt();
            assert!(mean.abs() < DEVIATION / 30.0, "{kind:?}: {mean}");
            assert!((deviation / DEVIATION - 1.0).abs() < 0.03, "{kind:?}: {deviation}");
        }
    }

    #[test]
    fn silent_rows_are_zeros_and_the_others_differ() {
        let blocks = RandomBlocks::new("test", TensorType::Q6_K, DEVIATION, 2);
        let row = |row| {
            let mut bytes = Vec::new();
            blocks.put(row, 256, &mut bytes);
            bytes
        };
        assert!(row(1).iter().all(|byte| *byte == 0));
        assert_eq!(row(2).len(), 210);
        assert!(row(2) == row(2) && row(2) != row(3));
    }
}

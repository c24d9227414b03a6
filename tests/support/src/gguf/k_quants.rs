//! ggml's K types: 256 numbers in sub-blocks, whose scales are themselves quantised.

use super::quants::f16_bits;

/// Numbers in a block (`QK_K`).
pub(crate) const BLOCK: usize = 256;

/// ggml's `block_q4_K`: f16 scale and f16 minimum, then 6 bits of scale and 6 of minimum for each of 8 sub-blocks, then
/// 256 nibbles. A number is d × scale × nibble - dmin × minimum.
pub(crate) fn q4_k(block: &[f32], out: &mut Vec<u8>) {
    let subs = block.chunks_exact(32).map(|sub| {
        let lowest = sub.iter().fold(0.0_f32, |min, x| min.min(*x));
        let highest = sub.iter().fold(0.0_f32, |max, x| max.max(*x));
        ((highest - lowest) / 15.0, -lowest)
    });
    let subs: Vec<(f32, f32)> = subs.collect();
    let d = subs.iter().fold(0.0_f32, |max, (scale, _)| max.max(*scale)) / 63.0;
    let dmin = subs.iter().fold(0.0_f32, |max, (_, minimum)| max.max(*minimum)) / 63.0;
    let six_bits = |x: f32, step: f32| if step == 0.0 { 0 } else { (x / step).round() as u8 };
    let mut pairs = [(0, 0); 8];
    for (pair, (scale, minimum)) in pairs.iter_mut().zip(&subs) {
        *pair = (six_bits(*scale, d), six_bits(*minimum, dmin));
    }
    out.extend(f16_bits(d).to_le_bytes());
    out.extend(f16_bits(dmin).to_le_bytes());
    out.extend(packed(&pairs));
    for (two, pairs) in block.chunks_exact(64).zip(pairs.chunks_exact(2)) {
        let nibble = |x: f32, (scale, minimum): (u8, u8)| {
            let step = d * f32::from(scale);
            let above = x + dmin * f32::from(minimum);
            if step == 0.0 { 0 } else { (above / step).round().clamp(0.0, 15.0) as u8 }
        };
        let (low, high) = two.split_at(32);
        out.extend(low.iter().zip(high).map(|(l, h)| nibble(*l, pairs[0]) | nibble(*h, pairs[1]) << 4));
    }
}

/// The 12 bytes of 8 scales and 8 minima, 6 bits each, as `get_scale_min_k4` reads them: the first four of either
/// whole, the upper two bits of each byte going to the last four.
pub(crate) fn packed(pairs: &[(u8, u8); 8]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for i in 0..4 {
        let ((scale, minimum), (later_scale, later_minimum)) = (pairs[i], pairs[i + 4]);
        bytes[i] = scale | later_scale >> 4 << 6;
        bytes[i + 4] = minimum | later_minimum >> 4 << 6;
        bytes[i + 8] = later_scale & 15 | later_minimum << 4;
    }
    bytes
}

/// ggml's `block_q6_K`: the low four bits of 256 numbers, their high two, a signed byte of scale for each 16 of them, and
/// an f16 scale. A number is d × scale × (bits - 32).
pub(crate) fn q6_k(block: &[f32], out: &mut Vec<u8>) {
    let largest = |sub: &[f32]| sub.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let d = largest(block) / 31.0 / 127.0;
    let mut scales = [0_i8; 16];
    let mut bits = [0_u8; BLOCK];
    for ((sub, scale), bits) in block.chunks_exact(16).zip(&mut scales).zip(bits.chunks_exact_mut(16)) {
        *scale = if d == 0.0 { 0 } else { (largest(sub) / 31.0 / d).round() as i8 };
        let step = d * f32::from(*scale);
        for (x, bits) in sub.iter().zip(bits) {
            let q = if step == 0.0 { 0.0 } else { (x / step).round().clamp(-32.0, 31.0) };
            *bits = (q as i8 + 32) as u8;
        }
    }
    for half in bits.chunks_exact(128) {
        out.extend((0..64).map(|i| half[i] & 15 | half[i + 64] << 4));
    }
    for half in bits.chunks_exact(128) {
        let high = |i: usize| half[i] >> 4;
        out.extend((0..32).map(|i| high(i) | high(i + 32) << 2 | high(i + 64) << 4 | high(i + 96) << 6));
    }
    out.extend(scales.map(|scale| scale as u8));
    out.extend(f16_bits(d).to_le_bytes());
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::quants::tests::half;
    use super::super::random::Random;
    use super::*;

    /// `dequantize_row_q4_K` for one block.
    pub(crate) fn from_q4_k(bytes: &[u8]) -> Vec<f32> {
        let (d, dmin) = (half(&bytes[..2]), half(&bytes[2..4]));
        let s = &bytes[4..16];
        let pair = |j: usize| match j {
            0..4 => (s[j] & 63, s[j + 4] & 63),
            _ => (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4),
        };
        let number = |i: usize| {
            let byte = bytes[16 + i / 64 * 32 + i % 32];
            let nibble = if i % 64 < 32 { byte & 15 } else { byte >> 4 };
            let (scale, minimum) = pair(i / 32);
            d * f32::from(scale) * f32::from(nibble) - dmin * f32::from(minimum)
        };
        (0..BLOCK).map(number).collect()
    }

    /// `dequantize_row_q6_K` for one block.
    pub(crate) fn from_q6_k(bytes: &[u8]) -> Vec<f32> {
        let d = half(&bytes[208..]);
        let number = |i: usize| {
            let (part, at) = (i / 128, i % 128);
            let low = bytes[part * 64 + at % 64] >> (at / 64 * 4) & 15;
            let high = bytes[128 + part * 32 + at % 32] >> (at / 32 * 2) & 3;
            let scale = bytes[192 + i / 16] as i8;
            d * f32::from(scale) * f32::from((low | high << 4) as i8 - 32)
        };
        (0..BLOCK).map(number).collect()
    }

    fn block() -> Vec<f32> {
        let mut block = vec![0.0; BLOCK];
        Random::new(1, "block", 0).add_noise(1.0, &mut block);
        // Sub-blocks that are larger, smaller, only positive and all zero.
        block[..32].iter_mut().for_each(|x| *x *= 3.0);
        block[32..64].iter_mut().for_each(|x| *x *= 0.2);
        block[64..96].iter_mut().for_each(|x| *x = x.abs());
        block[96..128].fill(0.0);
        block
    }

    #[test]
    fn four_bit_k_blocks_come_back_within_a_step() {
        let mut bytes = Vec::new();
        q4_k(&block(), &mut bytes);
        assert_eq!(bytes.len(), 144);
        // The widest sub-block reaches from -5.2 to 5.2; a step is a fifteenth of that, the scales' own rounding adds.
        for (x, back) in block().iter().zip(from_q4_k(&bytes)) {
            assert!((x - back).abs() < 0.45, "{x} {back}");
        }
    }

    #[test]
    fn six_bit_k_blocks_come_back_within_a_step() {
        let mut bytes = Vec::new();
        q6_k(&block(), &mut bytes);
        assert_eq!(bytes.len(), 210);
        for (x, back) in block().iter().zip(from_q6_k(&bytes)) {
            assert!((x - back).abs() < 0.1, "{x} {back}");
        }
    }

    #[test]
    fn a_block_of_zeros_is_zeros() {
        let mut bytes = Vec::new();
        q4_k(&[0.0; BLOCK], &mut bytes);
        assert!(from_q4_k(&bytes).iter().all(|x| *x == 0.0));
        bytes.clear();
        q6_k(&[0.0; BLOCK], &mut bytes);
        assert!(from_q6_k(&bytes).iter().all(|x| *x == 0.0));
    }
}

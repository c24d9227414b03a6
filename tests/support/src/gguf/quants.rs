//! How ggml stores 32 numbers that share a scale, and halves.

/// Numbers that share a scale.
pub(crate) const BLOCK: usize = 32;

/// ggml's `block_q8_0`: an f16 scale, then 32 signed bytes; a number is scale × byte.
pub(crate) fn q8_0(block: &[f32], out: &mut Vec<u8>) {
    let scale = block.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out.extend(f16_bits(scale).to_le_bytes());
    out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
}

/// ggml's `block_q4_0`: an f16 scale, then 16 bytes whose low nibbles are the first half of the block and whose high
/// nibbles are the second; a number is scale × (nibble - 8). The largest number takes the nibble 0, which reaches
/// further than 15 does.
pub(crate) fn q4_0(block: &[f32], out: &mut Vec<u8>) {
    let largest = block.iter().fold(0.0_f32, |max, x| if x.abs() > max.abs() { *x } else { max });
    let scale = largest / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let nibble = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    out.extend(f16_bits(scale).to_le_bytes());
    let (low, high) = block.split_at(BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(l, h)| nibble(*l) | nibble(*h) << 4));
}

/// IEEE 754 binary16, rounded to nearest, ties to even.
pub(crate) fn f16_bits(x: f32) -> u16 {
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
pub(crate) mod tests {
    use super::*;

    /// The number of a finite half.
    pub(crate) fn half(bytes: &[u8]) -> f32 {
        let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        // The exponents' offsets differ by 112; this holds below 2⁻¹⁴ too.
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * 2.0_f32.powi(112);
        if bits & 0x8000 == 0 { magnitude } else { -magnitude }
    }

    pub(crate) fn from_q8_0(bytes: &[u8]) -> Vec<f32> {
        bytes[2..].iter().map(|q| half(bytes) * f32::from(*q as i8)).collect()
    }

    pub(crate) fn from_q4_0(bytes: &[u8]) -> Vec<f32> {
        let (low, high) = (bytes[2..].iter().map(|b| b & 15), bytes[2..].iter().map(|b| b >> 4));
        low.chain(high).map(|q| half(bytes) * (f32::from(q) - 8.0)).collect()
    }

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
        q8_0(&block, &mut bytes);
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
        q4_0(&block, &mut bytes);
        assert_eq!(bytes.len(), 18);
        assert_eq!(bytes[..2], 0x3c00_u16.to_le_bytes());
        assert_eq!(bytes[2], 15 << 4);
        assert_eq!(bytes[3], 8 << 4 | 11);
        assert_eq!(bytes[4], 8 << 4 | 8);
    }
}

//! Reproducible numbers: the same seed and name give the same row on every machine, in whatever order rows are made.

/// splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
pub(crate) struct Random(u64);

impl Random {
    /// The stream for row `row` of what is called `name`.
    pub(crate) fn new(seed: u64, name: &str, row: u64) -> Self {
        // FNV-1a keeps streams of different names apart.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut mixed = Self(seed);
        let state = mixed.next() ^ hash;
        mixed.0 = state;
        let state = mixed.next() ^ row;
        mixed.0 = state;
        Self(mixed.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Adds even noise with mean 0 and the given standard deviation. Even, because it costs a fraction of normal
    /// noise and sums of it are normal all the same.
    pub(crate) fn add_noise(&mut self, deviation: f32, row: &mut [f32]) {
        // An even distribution over ±w has the deviation w/√3.
        let step = deviation * 3.0_f32.sqrt() / 2.0_f32.powi(31);
        for pair in row.chunks_mut(2) {
            let bits = self.next();
            for (x, half) in pair.iter_mut().zip([bits as u32, (bits >> 32) as u32]) {
                *x += half.cast_signed() as f32 * step;
            }
        }
    }

    /// Adds `scale` to each number or takes it away, by chance.
    pub(crate) fn add_signs(&mut self, scale: f32, row: &mut [f32]) {
        for chunk in row.chunks_mut(64) {
            let bits = self.next();
            for (i, x) in chunk.iter_mut().enumerate() {
                *x += if bits >> i & 1 == 1 { scale } else { -scale };
            }
        }
    }

    /// Fills `bytes`.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        let mut words = bytes.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        let rest = words.into_remainder();
        rest.copy_from_slice(&self.next().to_le_bytes()[..rest.len()]);
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, (self.next() % (i as u64 + 1)) as usize);
        }
    }
}

//! Prompts of a known length.

/// Words that are one token each in every shape's vocabulary.
const WORDS: &str = "rivers letters windows gardens mountains bridges lanterns harbors houses forests stories islands \
    valleys villages towers clocks birds horses foxes whales bees flowers leaves stones clouds stars shadows voices \
    songs dreams secrets paths roads ships trains markets kitchens mirrors ladders candles blankets apples";

/// A text of `n` tokens. Another seed gives another text, from the first word on, so that nothing computed for one
/// serves the other: seeds up to 1763 differ in the first two words.
pub(crate) fn words(n: usize, seed: u64) -> String {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let size = words.len() as u64;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let picks = (0..n as u64).map(|i| match i {
        0 => seed % size,
        1 => seed / size % size,
        _ => {
            // Knuth's MMIX generator: its upper bits are random enough for a text.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % size
        }
    });
    picks.map(|pick| words[pick as usize]).collect::<Vec<_>>().join(" ")
}

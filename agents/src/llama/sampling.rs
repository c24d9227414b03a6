use std::hash::{BuildHasher, RandomState};

use llama_cpp_2::sampling::LlamaSampler;
use sarai_core::request::Sampling;

/// What llama.cpp's own programs take where nothing is said.
const TEMPERATURE: f32 = 0.8;
const TOP_K: u32 = 40;
const TOP_P: f32 = 0.95;
const MIN_P: f32 = 0.05;
/// How many of the last tokens a repetition is looked for in.
const REPEAT_LAST: i32 = 64;

/// The chain that chooses each token.
pub(super) fn chain(sampling: &Sampling, n_vocab: i32) -> LlamaSampler {
    let mut samplers = Vec::new();
    if let Some(penalty) = sampling.repeat_penalty.filter(|penalty| *penalty > 0.0) {
        samplers.push(LlamaSampler::penalties(n_vocab, REPEAT_LAST, penalty, 0.0, 0.0));
    }
    let temperature = sampling.temperature.unwrap_or(TEMPERATURE);
    if temperature <= 0.0 {
        samplers.push(LlamaSampler::greedy());
    } else {
        samplers.extend([
            LlamaSampler::top_k(i32::try_from(sampling.top_k.unwrap_or(TOP_K)).unwrap_or(i32::MAX)),
            LlamaSampler::top_p(sampling.top_p.unwrap_or(TOP_P), 1),
            LlamaSampler::min_p(sampling.min_p.unwrap_or(MIN_P), 1),
            LlamaSampler::temp(temperature),
            LlamaSampler::dist(sampling.seed.unwrap_or_else(random_seed)),
        ]);
    }
    LlamaSampler::chain_simple(samplers)
}

/// Each `RandomState` has keys of its own.
fn random_seed() -> u32 {
    RandomState::new().hash_one(0_u8) as u32
}

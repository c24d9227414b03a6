//! Choosing the next token from the scores of all.

use std::hash::{BuildHasher, RandomState};

use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use sarai_core::request::GenerateRequest;

use super::constrain::Form;
use super::context::compute;
use crate::Error;

/// What llama.cpp's own programs take where nothing is said.
const TEMPERATURE: f32 = 0.8;
const TOP_K: u32 = 40;
const TOP_P: f32 = 0.95;
const MIN_P: f32 = 0.05;
/// How many of the last tokens a repetition is looked for in.
const REPEAT_LAST: usize = 64;

/// Chooses one sequence's tokens.
#[derive(Debug)]
pub(super) struct Chooser {
    chain: LlamaSampler,
    /// Whether the highest score wins as it stands, so that the scores need not be copied.
    plain: bool,
    form: Option<Form>,
    /// What is added to the scores of tokens.
    bias: Vec<(usize, f32)>,
    candidates: LlamaTokenDataArray,
}

impl Chooser {
    /// A chooser for what follows on `prompt`, whose words count as said.
    pub(super) fn new(
        request: &GenerateRequest,
        form: Option<Form>,
        n_vocab: i32,
        prompt: &[LlamaToken],
    ) -> Result<Self, Error> {
        let last = n_vocab.cast_unsigned().saturating_sub(1);
        if let Some((token, _)) = request.logit_bias.range(last + 1..).next() {
            return Err(Error::NoSuchToken { token: *token, last });
        }
        let bias: Vec<_> = request.logit_bias.iter().map(|(token, bias)| (*token as usize, *bias)).collect();
        let sampling = &request.sampling;
        let mut samplers = Vec::new();
        let penalty = sampling.repeat_penalty.filter(|penalty| *penalty > 0.0).unwrap_or(1.0);
        let presence = sampling.presence_penalty.unwrap_or(0.0);
        let frequency = sampling.frequency_penalty.unwrap_or(0.0);
        if penalty != 1.0 || presence != 0.0 || frequency != 0.0 {
            let last = REPEAT_LAST as i32;
            samplers.push(LlamaSampler::penalties(n_vocab, last, penalty, frequency, presence));
        }
        let temperature = sampling.temperature.unwrap_or(TEMPERATURE);
        let greedy = temperature <= 0.0;
        let plain = greedy && samplers.is_empty() && form.is_none() && bias.is_empty();
        if greedy {
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
        let mut chain = LlamaSampler::chain(samplers, true);
        // What stands in for an image or audio is no word.
        let last = &prompt[prompt.len().saturating_sub(REPEAT_LAST)..];
        chain.accept_many(last.iter().filter(|token| token.0 >= 0));
        Ok(Self { chain, plain, form, bias, candidates: LlamaTokenDataArray::new(Vec::new(), false) })
    }

    /// The token to come next, by the scores of the whole vocabulary.
    pub(super) fn choose(&mut self, scores: &[f32]) -> Result<LlamaToken, Error> {
        if self.plain {
            return highest(scores);
        }
        let candidates = &mut self.candidates;
        let candidate = |(id, score): (usize, &f32)| LlamaTokenData::new(LlamaToken(id as i32), *score, 0.0);
        candidates.data.clear();
        candidates.data.extend(scores.iter().enumerate().map(candidate));
        for (token, bias) in &self.bias {
            if let Some(candidate) = candidates.data.get_mut(*token) {
                candidate.set_logit(candidate.logit() + bias);
            }
        }
        (candidates.sorted, candidates.selected) = (false, None);
        if let Some(form) = &mut self.form {
            form.mask(candidates)?;
        }
        candidates.apply_sampler(&mut self.chain);
        // With all but a few scores at minus infinity, rounding may select one of those; the highest is allowed.
        let chosen = candidates
            .selected
            .and_then(|at| candidates.data.get(at))
            .filter(|chosen| chosen.logit() > f32::NEG_INFINITY)
            .or_else(|| candidates.data.iter().max_by(|a, b| a.logit().total_cmp(&b.logit())));
        chosen.map(LlamaTokenData::id).ok_or_else(|| compute("no token could be chosen"))
    }

    /// Notes that a token which does not end the answer was chosen.
    pub(super) fn accept(&mut self, token: LlamaToken) -> Result<(), Error> {
        if !self.plain {
            self.chain.accept(token);
        }
        self.form.as_mut().map_or(Ok(()), |form| form.accept(token))
    }
}

/// The first of the tokens with the highest score. In lanes, so that the CPU compares many at once.
fn highest(scores: &[f32]) -> Result<LlamaToken, Error> {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (rows, rest) = scores.as_chunks::<16>();
    for row in rows {
        lanes.iter_mut().zip(row).for_each(|(most, score)| *most = most.max(*score));
    }
    let most = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let first = scores.iter().position(|score| *score == most);
    first.map(|id| LlamaToken(id as i32)).ok_or_else(|| compute("the model's scores are no numbers"))
}

/// The natural logarithms of the probabilities of `token` and of the `n` likeliest ones, by their scores.
pub(super) fn logprobs(scores: &[f32], token: LlamaToken, n: usize) -> (f32, Vec<(LlamaToken, f32)>) {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|score| f64::from(score - most).exp()).sum();
    let log = |score: f32| score - most - sum.ln() as f32;
    let mut ranked: Vec<usize> = (0..scores.len()).collect();
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    let n = n.min(ranked.len());
    if n > 0 && n < ranked.len() {
        ranked.select_nth_unstable_by(n - 1, by_score);
    }
    ranked.truncate(n);
    ranked.sort_by(by_score);
    let own =
        usize::try_from(token.0).ok().and_then(|id| scores.get(id)).map_or(f32::NEG_INFINITY, |s| log(*s));
    (own, ranked.into_iter().map(|id| (LlamaToken(id as i32), log(scores[id]))).collect())
}

/// Each `RandomState` has keys of its own.
fn random_seed() -> u32 {
    RandomState::new().hash_one(0_u8) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax_likeliest_first() {
        let scores = [1.0_f32, 3.0, 2.0, -1.0];
        let sum: f32 = scores.iter().map(|s| s.exp()).sum();
        let (own, top) = logprobs(&scores, LlamaToken(0), 2);
        assert!((own - (1.0_f32.exp() / sum).ln()).abs() < 1e-5);
        assert_eq!(top.iter().map(|(token, _)| token.0).collect::<Vec<_>>(), [1, 2]);
        assert!((top[0].1 - (3.0_f32.exp() / sum).ln()).abs() < 1e-5);
        assert_eq!(logprobs(&scores, LlamaToken(0), 0).1, []);
        assert_eq!(logprobs(&scores, LlamaToken(0), 99).1.len(), 4);
    }

    #[test]
    fn the_first_of_the_highest_scores_wins_and_no_number_never_does() {
        assert_eq!(highest(&[f32::NAN, 1.0, 2.0, 2.0]).unwrap(), LlamaToken(2));
        assert!(highest(&[f32::NAN, f32::NAN]).is_err());
        let mut many = vec![0.0; 1000];
        (many[517], many[990]) = (3.0, 3.0);
        assert_eq!(highest(&many).unwrap(), LlamaToken(517));
    }
}

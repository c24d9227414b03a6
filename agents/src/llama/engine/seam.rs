//! Where an answer that was begun elsewhere is gone on with. Its last blank is often the beginning of the next word to a model:
//! ` word` is one token. After a blank that stands alone the model would have to write what it never does. So the blank is not
//! given to it, and the first token has to begin with one, which is not said again.

use llama_cpp_2::token::LlamaToken;

use super::super::load::Loaded;

const BLANK: char = ' ';

/// The first token after a text that ended with a blank.
#[derive(Debug)]
pub(super) struct Seam {
    /// By token: whether it may come first, because it begins with a blank or ends the answer.
    may_begin: Vec<bool>,
}

impl Seam {
    /// The text that the model is given of what has been said, and what holds for its first token. Where the vocabulary has no
    /// tokens that begin with a blank, or there is nothing but the blank, all of it is given.
    pub(super) fn after<'s>(said: &'s str, loaded: &Loaded) -> (&'s str, Option<Self>) {
        let Some(given) =
            said.strip_suffix(BLANK).filter(|given| !given.is_empty() && !given.ends_with(BLANK))
        else {
            return (said, None);
        };
        let vocab = loaded.model().vocab();
        let begins =
            |token: LlamaToken| vocab.token_to_piece(token, false, None).first() == Some(&(BLANK as u8));
        let mut words = 0;
        let may_begin = (0..vocab.n_tokens()).map(LlamaToken).map(|token| {
            let begins = begins(token);
            words += usize::from(begins);
            begins || vocab.is_eog(token)
        });
        let may_begin: Vec<bool> = may_begin.collect();
        if words == 0 { (said, None) } else { (given, Some(Self { may_begin })) }
    }

    /// The scores, with those of tokens that may not come first below all others.
    pub(super) fn masked(&self, scores: &[f32]) -> Vec<f32> {
        let masked = |(score, may_begin): (&f32, &bool)| if *may_begin { *score } else { f32::NEG_INFINITY };
        scores.iter().zip(&self.may_begin).map(masked).collect()
    }

    /// The first token's text without the blank that was said before.
    pub(super) fn rest(text: String) -> String {
        text.strip_prefix(BLANK).map(str::to_owned).unwrap_or(text)
    }
}

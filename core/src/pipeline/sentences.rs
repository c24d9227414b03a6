//! Cuts a text that is still being written into sentences.

use unicode_segmentation::UnicodeSegmentation;

/// Text as it comes, and the sentences of it that are complete: those after which another one has begun. By Unicode's rules
/// (UAX #29), which do not know abbreviations: so one word alone is no sentence, and goes with the next.
#[derive(Debug, Default)]
pub(super) struct Sentences {
    held: String,
}

impl Sentences {
    /// The sentences that are complete now, each with the white space after it.
    pub(super) fn push(&mut self, text: &str) -> Vec<String> {
        self.held.push_str(text);
        let mut complete = joined(&self.held);
        // The last one may go on.
        let rest = complete.pop().unwrap_or_default();
        self.held = rest;
        complete
    }

    /// What is left at the text's end.
    pub(super) fn finish(self) -> Option<String> {
        (!self.held.trim().is_empty()).then_some(self.held)
    }
}

/// The sentences of a text, words that stand alone joined with what follows.
fn joined(text: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for piece in text.split_sentence_bounds() {
        match all.last_mut() {
            Some(before) if before.unicode_words().count() < 2 => before.push_str(piece),
            _ => all.push(piece.to_owned()),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What comes out when the text comes in pieces of so many characters.
    fn cut(text: &str, characters: usize) -> Vec<String> {
        let mut sentences = Sentences::default();
        let letters: Vec<char> = text.chars().collect();
        let mut out: Vec<String> = letters
            .chunks(characters)
            .flat_map(|piece| sentences.push(&piece.iter().collect::<String>()))
            .collect();
        out.extend(sentences.finish());
        out
    }

    #[test]
    fn sentences_come_whole_whatever_the_pieces() {
        let text = "It will rain tomorrow. Take a coat!  Will you? ¿Vendrás mañana? Dr. Soto viene a las 3.5 horas\nAnd then";
        for characters in [1, 2, 3, 7, 1000] {
            assert_eq!(
                cut(text, characters),
                [
                    "It will rain tomorrow. ",
                    "Take a coat!  ",
                    "Will you? ",
                    "¿Vendrás mañana? ",
                    "Dr. Soto viene a las 3.5 horas\n",
                    "And then"
                ],
                "{characters}"
            );
        }
    }

    #[test]
    fn a_text_without_an_end_is_one_sentence_and_white_space_is_none() {
        assert_eq!(cut("no full stop here", 4), ["no full stop here"]);
        assert!(cut("", 1).is_empty() && cut("  \n", 1).is_empty());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_doubled(text in "[a-z .!?¿\n]{0,80}", characters in 1..9_usize) {
            let out = cut(&text, characters).concat();
            prop_assert_eq!(out.trim_end(), text.trim_end());
        }
    }
}

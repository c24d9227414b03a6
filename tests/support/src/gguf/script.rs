//! What a text model says: four clauses, two of them English and two Spanish, a word of each place in turn.
//!
//! A place is a step in that text and has a direction of its own in the model's state. A token carries its place into
//! the model, and the model gives the next place's tokens the best chances: which of them it takes depends on its
//! random weights and on everything before.

use std::collections::BTreeMap;

use super::random::Random;
use super::vocab::{END_OF_TURN, Vocab, byte_char, byte_text};
use super::words::{ENGLISH, Lexicon, SPANISH};

/// The place of all tokens that are none of the script's words; the text begins after it.
const START: u32 = 0;

/// For each token, by id.
pub(crate) struct Script {
    /// The place that it stands in.
    pub(crate) place: Vec<u32>,
    /// The places after which it is likely. Empty: it is never likely.
    pub(crate) follows: Vec<Vec<u32>>,
}

impl Script {
    /// Sorts the words into places, by chance. Where `endless`, the text begins again instead of ending.
    pub(crate) fn new(seed: u64, endless: bool, vocab: &Vocab) -> Self {
        let ids: BTreeMap<&str, usize> =
            vocab.tokens.iter().enumerate().map(|(id, t)| (t.text.as_str(), id)).collect();
        let mut script = Self { place: vec![START; vocab.len()], follows: vec![Vec::new(); vocab.len()] };
        let places = places(seed);
        let last = places.len() as u32;
        for (words, place) in places.iter().zip(1..) {
            for word in words {
                let spaced = format!("{}{word}", byte_char(b' '));
                let forms = [ids.get(word), ids.get(spaced.as_str())];
                forms.into_iter().flatten().for_each(|id| script.place[*id] = place);
                // The first word, and a sign, has no space before it.
                let said = if place == 1 || is_sign(word) { forms[0] } else { forms[1] };
                said.into_iter().for_each(|id| script.follows[*id].push(place - 1));
            }
            if words.contains(&".") && !endless {
                ids.get(END_OF_TURN).into_iter().for_each(|id| script.follows[*id].push(place));
            }
        }
        let end = if endless { byte_char(b'\n').to_string() } else { END_OF_TURN.to_owned() };
        ids.get(end.as_str()).into_iter().for_each(|id| script.follows[*id].push(last));
        script
    }
}

impl Script {
    /// These texts one after another, and the end. Each is a token of its own, as [`Vocab::add_text`] makes it.
    pub(crate) fn saying(texts: &[String], vocab: &Vocab) -> Self {
        let id = |text: &str| vocab.tokens.iter().position(|token| token.text == text);
        let mut script = Self { place: vec![START; vocab.len()], follows: vec![Vec::new(); vocab.len()] };
        for (text, place) in texts.iter().zip(1..) {
            if let Some(id) = id(&byte_text(text)) {
                script.place[id] = place;
                script.follows[id].push(place - 1);
            }
        }
        if let Some(end) = id(END_OF_TURN) {
            script.follows[end].push(texts.len() as u32);
        }
        script
    }
}

/// The words of each place.
fn places(seed: u64) -> Vec<Vec<&'static str>> {
    let mut random = Random::new(seed, "script", 0);
    let mut english = clauses(&ENGLISH, |adjectives, nouns| [adjectives, nouns], &mut random);
    let mut spanish = clauses(&SPANISH, |adjectives, nouns| [nouns, adjectives], &mut random);
    let mut languages = [&mut english, &mut spanish];
    random.shuffle(&mut languages);
    let [one, two] = languages;
    let mut places = Vec::new();
    // The clauses of a language stand together, so that a sentence is in one language.
    for (clause, sign) in one.drain(..).chain(two.drain(..)).zip([",", ".", ";", "!"]) {
        places.extend(clause);
        places.push(vec![sign]);
    }
    places
}

type Words = Vec<&'static str>;

/// Two clauses: who does what to whom, and where.
fn clauses(
    lexicon: &Lexicon,
    order: impl Fn(Words, Words) -> [Words; 2],
    random: &mut Random,
) -> Vec<Vec<Words>> {
    let mut split = |words: &'static str, parts| {
        let mut words: Words = words.split_whitespace().collect();
        random.shuffle(&mut words);
        let size = words.len() / parts;
        words.chunks(size).map(<[_]>::to_vec).collect::<Vec<_>>().into_iter()
    };
    let nouns = split(lexicon.nouns, 6).zip(split(lexicon.adjectives, 6));
    let mut phrases = nouns.map(|(nouns, adjectives)| order(adjectives, nouns));
    let links = split(lexicon.verbs, 2).zip(split(lexicon.prepositions, 2));
    let clause = |(verbs, prepositions)| {
        let mut phrase = || phrases.next().into_iter().flatten();
        let mut clause: Vec<Words> = phrase().collect();
        clause.push(verbs);
        clause.extend(phrase());
        clause.push(prepositions);
        clause.extend(phrase());
        clause
    };
    links.map(clause).collect()
}

fn is_sign(word: &str) -> bool {
    !word.starts_with(|c: char| c.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_followed_by_some_token_and_the_last_by_the_end() {
        let vocab = Vocab::byte_level("llama-bpe", false);
        for seed in 0..8 {
            let script = Script::new(seed, false, &vocab);
            let last = places(seed).len() as u32;
            assert_eq!(last, 4 * 9);
            for place in 0..=last {
                assert!(script.follows.iter().any(|f| f.contains(&place)), "nothing after {place}");
            }
            let end = vocab.tokens.iter().position(|t| t.text == END_OF_TURN).unwrap();
            assert_eq!(script.follows[end], [18, 36]);
        }
    }

    #[test]
    fn an_endless_script_begins_again_on_a_new_line() {
        let vocab = Vocab::byte_level("llama-bpe", false);
        let script = Script::new(0, true, &vocab);
        let id = |text: &str| vocab.tokens.iter().position(|t| t.text == text).unwrap();
        assert_eq!(script.follows[id("Ċ")], [36]);
        assert_eq!(script.place[id("Ċ")], START);
        assert!(script.follows[id(END_OF_TURN)].is_empty());
    }
}

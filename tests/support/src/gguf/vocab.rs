//! The three kinds of tokenizer, with vocabularies of a thousand tokens or so.

use std::collections::BTreeSet;

use super::words;
use super::writer::Writer;

/// A token's kind, numbered as in `llama_token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    Unused = 5,
    Byte = 6,
}

pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) kind: TokenKind,
}

/// The contents of `tokenizer.ggml.*`. No two tokens have the same text: llama.cpp ends the process over such a pair.
pub(crate) struct Vocab {
    pub(crate) tokens: Vec<Token>,
    seen: BTreeSet<String>,
    model: &'static str,
    pre: &'static str,
    /// Pairs to be merged, the first first; byte-level BPE only.
    merges: Vec<String>,
    /// Ids and flags, without `tokenizer.ggml.`.
    ids: Vec<(&'static str, u32)>,
    flags: Vec<(&'static str, bool)>,
}

/// What a word begins with in a SentencePiece vocabulary, and in llama.cpp's form of a WordPiece one.
pub(crate) const WORD_START: char = '▁';
/// The marker of end of text in the text models.
pub(crate) const END_OF_TURN: &str = "<|im_end|>";

impl Vocab {
    /// Byte-level BPE: every text comes back as it was. A known word is one token, with or without a space before it,
    /// for the pre-tokenizers named here look a whole word up before they merge.
    pub(crate) fn byte_level(pre: &'static str, add_bos: bool) -> Self {
        let mut v = Self::new("gpt2", pre);
        for special in ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", END_OF_TURN] {
            v.add(special, TokenKind::Control);
        }
        v.ids = vec![("padding_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 4)];
        v.flags = vec![("add_bos_token", add_bos)];
        for byte in 0..=255 {
            v.add(byte_char(byte), TokenKind::Normal);
        }
        let space = byte_char(b' ');
        for merge in MERGES.split('|') {
            let merge = merge.replace('_', &space.to_string());
            v.add(merge.replace(' ', ""), TokenKind::Normal);
            v.merges.push(merge);
        }
        for word in words::all() {
            v.add(format!("{space}{word}"), TokenKind::Normal);
            v.add(word, TokenKind::Normal);
        }
        v
    }

    /// WordPiece as in BERT: lower case without accents; the known words, `more` words, and pairs of letters and
    /// single characters for all others. A text with characters beyond ASCII does not come back.
    pub(crate) fn word_piece(more: &[String]) -> Self {
        let mut v = Self::new("bert", "default");
        for special in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] {
            v.add(special, TokenKind::Control);
        }
        v.ids = vec![
            ("padding_token_id", 0),
            ("unknown_token_id", 1),
            // Without an id of its own llama.cpp takes 101 for the first token.
            ("bos_token_id", 2),
            ("cls_token_id", 2),
            ("seperator_token_id", 3), // sic
            ("mask_token_id", 4),
            ("token_type_count", 2),
        ];
        v.flags = vec![("add_bos_token", true)];
        let visible = (33..127).map(char::from).filter(|c| !c.is_ascii_uppercase());
        for piece in visible.map(String::from).chain(pairs()) {
            v.add(format!("{WORD_START}{piece}"), TokenKind::Normal);
            v.add(piece, TokenKind::Normal);
        }
        for word in words::all().into_iter().chain(more.iter().map(String::as_str)) {
            v.add(format!("{WORD_START}{word}"), TokenKind::Normal);
        }
        v
    }

    /// SentencePiece as in Gemma: the known words and all that they begin with, pairs of letters, single ASCII characters,
    /// and bytes for the rest, so that every text comes back.
    pub(crate) fn sentence_piece() -> Self {
        let mut v = Self::new("llama", "default");
        v.add("<pad>", TokenKind::Control);
        v.add("<eos>", TokenKind::Control);
        v.add("<bos>", TokenKind::Control);
        v.add("<unk>", TokenKind::Unknown);
        v.ids =
            vec![("padding_token_id", 0), ("eos_token_id", 1), ("bos_token_id", 2), ("unknown_token_id", 3)];
        v.flags = vec![("add_bos_token", true), ("add_eos_token", true), ("add_space_prefix", true)];
        for byte in 0..=255_u8 {
            v.add(format!("<0x{byte:02X}>"), TokenKind::Byte);
        }
        v.add(WORD_START, TokenKind::Normal);
        (33..127).map(char::from).for_each(|c| v.add(c, TokenKind::Normal));
        pairs().for_each(|pair| v.add(pair, TokenKind::Normal));
        // Pieces are merged two at a time, so a word is only found where all its beginnings are tokens as well.
        for word in words::all() {
            for end in 1..=word.len() {
                v.add(format!("{WORD_START}{}", &word[..end]), TokenKind::Normal);
            }
        }
        v
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Adds tokens that no text has and no model says, up to `n` in all.
    pub(crate) fn fill_up(&mut self, n: usize) {
        for i in self.len()..n {
            self.add(format!("[unused{i}]"), TokenKind::Unused);
        }
    }

    /// Adds a text as one token, which the tokenizer need not find; byte-level BPE only.
    pub(crate) fn add_text(&mut self, text: &str) {
        self.add(byte_text(text), TokenKind::Normal);
    }

    /// Adds made-up words that a model may say, up to `n` tokens in all; byte-level BPE only. What it has said comes back
    /// from the tokenizer as the same tokens, as a conversation needs it.
    pub(crate) fn fill_with_words(&mut self, n: usize) {
        let space = byte_char(b' ');
        for i in 0.. {
            if self.len() >= n {
                break;
            }
            self.add(format!("{space}{}", made_up_word(i)), TokenKind::Normal);
        }
    }

    /// The leading tokens that are no words: special ones and single bytes.
    pub(crate) fn wordless(&self) -> usize {
        let is_word = |t: &Token| t.kind == TokenKind::Normal && t.text.chars().nth(1).is_some();
        self.tokens.iter().position(is_word).unwrap_or(self.len())
    }

    pub(crate) fn put(&self, w: &mut Writer) {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        w.set(key("model"), self.model);
        w.set(key("pre"), self.pre);
        w.set(key("tokens"), self.tokens.iter().map(|t| t.text.clone()).collect::<Vec<_>>());
        w.set(key("token_type"), self.tokens.iter().map(|t| t.kind as i32).collect::<Vec<_>>());
        match self.model {
            "gpt2" => w.set(key("merges"), self.merges.clone()),
            // Longer pieces are merged first.
            "llama" => {
                let score =
                    |t: &Token| if t.kind == TokenKind::Normal { t.text.chars().count() as f32 } else { 0.0 };
                w.set(key("scores"), self.tokens.iter().map(score).collect::<Vec<_>>());
            }
            _ => {}
        }
        self.ids.iter().for_each(|(name, id)| w.set(key(name), *id));
        self.flags.iter().for_each(|(name, flag)| w.set(key(name), *flag));
    }

    fn new(model: &'static str, pre: &'static str) -> Self {
        let (tokens, merges, ids, flags) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { tokens, seen: BTreeSet::new(), model, pre, merges, ids, flags }
    }

    fn add(&mut self, text: impl Into<String>, kind: TokenKind) {
        let text = text.into();
        if self.seen.insert(text.clone()) {
            self.tokens.push(Token { text, kind });
        }
    }
}

fn pairs() -> impl Iterator<Item = String> {
    ('a'..='z').flat_map(|a| ('a'..='z').map(move |b| format!("{a}{b}")))
}

/// Three syllables and a consonant, another for each `i` below 20 million.
fn made_up_word(i: usize) -> String {
    const CONSONANTS: &[u8] = b"bcdfghjklmnpqrstvwxz";
    const VOWELS: &[u8] = b"aeiou";
    let mut rest = i;
    let places = [CONSONANTS, VOWELS].into_iter().cycle().take(7);
    let letter = |letters: &[u8]| {
        let letter = letters[rest % letters.len()];
        rest /= letters.len();
        char::from(letter)
    };
    places.map(letter).collect()
}

/// A text as a byte-level vocabulary writes it.
pub(crate) fn byte_text(text: &str) -> String {
    text.bytes().map(byte_char).collect()
}

/// The character that stands for a byte in a byte-level vocabulary: itself where it is visible in Latin-1, else the
/// next free one from U+0100 on (the table of GPT-2's `bytes_to_unicode`).
pub(crate) fn byte_char(byte: u8) -> char {
    let visible = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !visible(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Frequent pairs of letters, for the words that are no token; `_` is a space.
const MERGES: &str = "_ t|_ a|h e|i n|r e|o n|e r|_ s|a t|_ w|_ o|e n|_ c|i t|i s|a n|o r|e s|_ b|e d|_ f|_ p|o u|\
    a l|a r|_ m|_ d|_ h|l e|v e|o w|l l|s t|d e|q u|l a|c o|c i|t a|o s|a s";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vocabulary_is_filled_with_words_that_all_differ() {
        let mut vocab = Vocab::byte_level("llama-bpe", false);
        let before = vocab.len();
        vocab.fill_with_words(40_000);
        assert_eq!((vocab.len(), vocab.tokens[before].text.as_str()), (40_000, "Ġbababab"));
        assert!(vocab.tokens[vocab.wordless()].text == "Ġt" && vocab.wordless() == 5 + 256);
    }

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let chars: BTreeSet<char> = (0..=255).map(byte_char).collect();
        assert_eq!(chars.len(), 256);
        assert_eq!([byte_char(b'\n'), byte_char(b' '), byte_char(0xad)], ['Ċ', 'Ġ', 'Ń']);
    }
}

//! From tokens' bytes to text that may be shown: whole characters, and nothing of a stop text.

/// Puts characters together from bytes that come in pieces.
#[derive(Debug, Default)]
pub(crate) struct Characters {
    held: Vec<u8>,
}

impl Characters {
    /// Adds bytes and takes the characters that are whole. Bytes that can be no character become U+FFFD.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.held) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.held.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.held[..valid]));
                    let Some(invalid) = error.error_len() else {
                        // The beginning of a character: its rest may come.
                        self.held.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.held.drain(..valid + invalid);
                }
            }
        }
    }

    /// Nothing more comes: what is held is no character.
    pub(crate) fn finish(&mut self) -> String {
        let left = std::mem::take(&mut self.held);
        String::from_utf8_lossy(&left).into_owned()
    }
}

/// Ends a text before any of the stop texts, wherever tokens may cut these.
#[derive(Debug)]
pub(crate) struct Stops {
    stops: Vec<String>,
    held: String,
    /// Bytes at the beginning of what is held that were shown before.
    shown: usize,
    found: bool,
}

impl Stops {
    pub(crate) fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new(), shown: 0, found: false }
    }

    /// For a text that goes on after `said`, which was shown: a stop text may have begun there.
    pub(crate) fn after(stops: &[String], said: &str) -> Self {
        let new = Self::new(stops);
        let begun = new.stops.iter().map(|stop| overlap(said, stop)).max().unwrap_or(0);
        Self { held: said[said.len() - begun..].to_owned(), shown: begun, ..new }
    }

    /// Adds text and takes what cannot be part of a stop text any more.
    pub(crate) fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.found = true;
            self.held.truncate(at);
            return self.take(at);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        self.take(self.held.len() - keep)
    }

    /// Takes so many bytes, without those that were shown before.
    fn take(&mut self, bytes: usize) -> String {
        let shown = self.shown.min(bytes);
        self.shown -= shown;
        let taken: String = self.held.drain(..bytes).collect();
        taken[shown..].to_owned()
    }

    /// Whether a stop text came up.
    pub(crate) fn found(&self) -> bool {
        self.found
    }

    /// Nothing more comes: what is held is text.
    pub(crate) fn finish(&mut self) -> String {
        if self.found { String::new() } else { self.take(self.held.len()) }
    }
}

/// The length of the longest end of `text` that is a beginning of `stop`.
pub(crate) fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    let at_boundary = |&length: &usize| stop.is_char_boundary(length);
    (1..=longest).rev().filter(at_boundary).find(|&length| text.ends_with(&stop[..length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_cut_into_bytes_comes_out_whole() {
        let mut characters = Characters::default();
        let shown: Vec<String> = "añ😀".as_bytes().iter().map(|byte| characters.push(&[*byte])).collect();
        assert_eq!(shown, ["a", "", "ñ", "", "", "", "😀"]);
        assert_eq!(characters.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_character_are_replaced_and_lose_nothing_around_them() {
        let mut characters = Characters::default();
        assert_eq!(characters.push(b"a\xffb\xf0\x9f"), "a\u{fffd}b");
        assert_eq!(characters.push(b"z"), "\u{fffd}z");
        assert_eq!(characters.push(b"\xc3"), "");
        assert_eq!(characters.finish(), "\u{fffd}");
    }

    #[test]
    fn a_stop_text_across_pieces_is_found_and_not_shown() {
        let mut stops = Stops::new(&["<end>".to_owned()]);
        let shown: String = ["one <", "en", "d> two"].iter().map(|piece| stops.push(piece)).collect();
        assert_eq!((shown.as_str(), stops.found()), ("one ", true));
        assert_eq!(stops.finish(), "");
    }

    #[test]
    fn what_only_began_like_a_stop_text_is_shown_after_all() {
        let mut stops = Stops::new(&["<end>".to_owned()]);
        assert_eq!(stops.push("a <en"), "a ");
        assert_eq!(stops.push("ough"), "<enough");
        assert_eq!(stops.push(" <e"), " ");
        assert_eq!(stops.finish(), "<e");
    }

    #[test]
    fn a_stop_text_that_began_in_what_was_said_before_is_found() {
        let mut stops = Stops::after(&["<end>".to_owned()], "one <e");
        assert_eq!((stops.push("nd> two").as_str(), stops.found()), ("", true));
        let mut stops = Stops::after(&["<end>".to_owned()], "one <e");
        assert_eq!(stops.push("ither") + &stops.finish(), "ither", "nothing is said twice");
        let mut stops = Stops::after(&["<end>".to_owned()], "one <e");
        assert_eq!(stops.push("n") + &stops.push("t<en") + &stops.finish(), "nt<en");
    }

    proptest! {
        #[test]
        fn wherever_a_text_is_gone_on_with_nothing_is_lost_or_said_twice(
            text in "[ab]{0,30}", stop in "[ab]{1,4}", at in 0..31_usize, cut in 0..31_usize
        ) {
            let at = at.min(text.len());
            let (said, rest) = text.split_at(at);
            let mut before = Stops::new(std::slice::from_ref(&stop));
            let shown = before.push(said) + &before.finish();
            if !before.found() {
                let (first, second) = rest.split_at(cut.min(rest.len()));
                let mut after = Stops::after(std::slice::from_ref(&stop), &shown);
                let shown = shown + &after.push(first) + &after.push(second) + &after.finish();
                let whole = text.find(&stop).map_or(text.as_str(), |end| &text[..end]);
                // What was shown of a stop text before is not taken back.
                prop_assert_eq!(shown, &text[..whole.len().max(at)]);
            }
        }

        #[test]
        fn however_text_is_cut_the_same_is_shown(text in "[ab]{0,30}", stop in "[ab]{1,4}", cuts in proptest::collection::vec(0..31_usize, 0..6)) {
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]).to_owned();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let mut stops = Stops::new(&[stop]);
            let mut shown: String = cuts.windows(2).map(|cut| stops.push(&text[cut[0]..cut[1]])).collect();
            shown.push_str(&stops.finish());
            prop_assert_eq!(shown, expected);
        }
    }
}

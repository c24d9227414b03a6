//! What is kept of sequences that have ended, for requests that begin in the same way. Pure bookkeeping: which sequence
//! of the context holds which tokens.

use llama_cpp_2::token::LlamaToken;

use super::super::context::SeqId;
use super::super::prompt::common;

/// A sequence that nobody writes to any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) sequence: SeqId,
    pub(super) tokens: Vec<LlamaToken>,
}

/// The kept sequences, the least recently used first.
#[derive(Debug)]
pub(super) struct Kept {
    entries: Vec<Entry>,
    /// Whether a sequence can only be gone on with as a whole, because its model has a recurrent state.
    whole: bool,
}

/// How far a sequence of `held` tokens helps with `prompt`: the tokens that need not be computed. The prompt's last token
/// always has to be, because nothing else says what comes next.
pub(in super::super) fn reusable(held: &[LlamaToken], prompt: &[LlamaToken], whole: bool) -> usize {
    let common = common(held, &prompt[..prompt.len().saturating_sub(1)]);
    if whole && common < held.len() { 0 } else { common }
}

impl Kept {
    pub(super) fn new(whole: bool) -> Self {
        Self { entries: Vec::new(), whole }
    }

    /// The entry that helps most with `prompt`, and how far; it counts as used.
    pub(super) fn best(&mut self, prompt: &[LlamaToken]) -> Option<(&Entry, usize)> {
        let help = |entry: &Entry| reusable(&entry.tokens, prompt, self.whole);
        let (at, length) = self
            .entries
            .iter()
            .enumerate()
            .map(|(at, entry)| (at, help(entry)))
            .max_by_key(|(_, length)| *length)?;
        if length == 0 {
            return None;
        }
        let entry = self.entries.remove(at);
        self.entries.push(entry);
        self.entries.last().map(|entry| (entry, length))
    }

    /// Keeps a sequence. Returns those that it makes superfluous: where any beginning can be used, those that it begins
    /// with.
    pub(super) fn insert(&mut self, entry: Entry) -> Vec<Entry> {
        let superfluous = |other: &mut Entry| {
            other.tokens == entry.tokens || !self.whole && entry.tokens.starts_with(&other.tokens)
        };
        let gone = self.entries.extract_if(.., superfluous).collect();
        self.entries.push(entry);
        gone
    }

    /// Takes the entry of a sequence out, for a request that goes on with it.
    pub(super) fn take(&mut self, sequence: SeqId) -> Option<Entry> {
        let at = self.entries.iter().position(|entry| entry.sequence == sequence)?;
        Some(self.entries.remove(at))
    }

    /// The tokens of all, common beginnings counted each time.
    pub(super) fn tokens(&self) -> usize {
        self.entries.iter().map(|entry| entry.tokens.len()).sum()
    }

    /// Takes the least recently used one out.
    pub(super) fn take_oldest(&mut self) -> Option<Entry> {
        (!self.entries.is_empty()).then(|| self.entries.remove(0))
    }

    /// Takes all out.
    pub(super) fn take_all(&mut self) -> Vec<Entry> {
        std::mem::take(&mut self.entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[i32]) -> Vec<LlamaToken> {
        ids.iter().copied().map(LlamaToken).collect()
    }

    fn entry(sequence: SeqId, ids: &[i32]) -> Entry {
        Entry { sequence, tokens: tokens(ids) }
    }

    fn best(kept: &mut Kept, prompt: &[i32]) -> Option<(SeqId, usize)> {
        kept.best(&tokens(prompt)).map(|(entry, length)| (entry.sequence, length))
    }

    #[test]
    fn the_longest_common_beginning_helps_most_and_the_last_token_is_always_computed() {
        let mut kept = Kept::new(false);
        assert!(kept.insert(entry(0, &[1, 2, 3])).is_empty());
        assert!(kept.insert(entry(1, &[1, 2, 4, 5])).is_empty());
        assert_eq!(best(&mut kept, &[1, 2, 4, 9]), Some((1, 3)));
        assert_eq!(best(&mut kept, &[1, 2, 3]), Some((1, 2)), "the last one used of two that help as much");
        assert_eq!(best(&mut kept, &[7, 8]), None);
        assert_eq!(best(&mut kept, &[1]), None);
    }

    #[test]
    fn a_recurrent_state_helps_only_as_a_whole() {
        let mut kept = Kept::new(true);
        kept.insert(entry(0, &[1, 2, 3, 4]));
        kept.insert(entry(1, &[1, 2]));
        assert_eq!(best(&mut kept, &[1, 2, 3, 9]), Some((1, 2)));
        assert_eq!(best(&mut kept, &[1, 2, 3, 4, 5]), Some((0, 4)));
        assert_eq!(best(&mut kept, &[1, 2]), None, "nothing would be left to compute");
    }

    #[test]
    fn what_a_longer_one_begins_with_is_superfluous_unless_states_cannot_be_cut() {
        let mut kept = Kept::new(false);
        kept.insert(entry(0, &[1, 2]));
        assert_eq!(kept.insert(entry(1, &[1, 2, 3])), [entry(0, &[1, 2])]);
        let mut recurrent = Kept::new(true);
        recurrent.insert(entry(0, &[1, 2]));
        assert!(recurrent.insert(entry(1, &[1, 2, 3])).is_empty());
        assert_eq!(recurrent.insert(entry(2, &[1, 2, 3])), [entry(1, &[1, 2, 3])]);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut kept = Kept::new(false);
        kept.insert(entry(0, &[1, 2]));
        kept.insert(entry(1, &[3, 4]));
        best(&mut kept, &[1, 2, 3]);
        assert_eq!(kept.take_oldest().unwrap().sequence, 1);
        assert_eq!(kept.take(0).unwrap().sequence, 0);
        assert!(kept.take_oldest().is_none() && kept.take(0).is_none());
    }
}

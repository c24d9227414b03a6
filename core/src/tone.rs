//! Tones: how a text is said again so that it sounds otherwise and says the same.

use std::collections::BTreeMap;

use crate::nearest::nearest;
use crate::request::{GenerateRequest, Message, Sampling};

/// A way to say things.
#[derive(Clone, Debug, PartialEq)]
pub struct Tone {
    /// The instruction to the model. That it keeps language and facts and adds nothing is said besides.
    pub prompt: String,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Whether it needs the whole text at once. Otherwise a text that is still being written is said again sentence by
    /// sentence.
    pub whole: bool,
}

/// The tones that are always there: what follows on "Rewrite the user's text so that its tone is", and whether they need the
/// whole text.
const BUILT_IN: [(&str, &str, bool); 4] = [
    ("brief", "as brief as possible, without losing a fact", true),
    ("empathetic", "empathetic: first acknowledge how the listener may feel, then say it gently", false),
    ("formal", "formal and courteous, without slang or contractions", false),
    ("friendly", "warm, friendly and close, like a good acquaintance", false),
];

/// What holds for every tone.
const RULES: &str = "Keep its language, its meaning and every fact. Answer with the rewritten text only.";

impl Tone {
    /// A tone by its description, such as `solemn` or `like a pirate`.
    #[must_use]
    pub fn described(description: &str) -> Self {
        Self {
            prompt: format!("Rewrite the user's text so that its tone is {description}."),
            sampling: Sampling::default(),
            whole: false,
        }
    }

    /// The request that says `text` again in this tone.
    #[must_use]
    pub fn request(&self, text: &str) -> GenerateRequest {
        let system = Message::system(format!("{} {RULES}", self.prompt));
        GenerateRequest::chat(vec![system, Message::user(text)]).with_sampling(self.sampling.clone())
    }
}

/// Tones by name: the built-in ones, and those of the configuration, which go before.
#[derive(Clone, Debug, PartialEq)]
pub struct Tones(BTreeMap<String, Tone>);

impl Default for Tones {
    fn default() -> Self {
        Self::new(BTreeMap::new())
    }
}

impl Tones {
    /// The built-in tones and these.
    #[must_use]
    pub fn new(own: BTreeMap<String, Tone>) -> Self {
        let built_in = BUILT_IN.map(|(name, description, whole)| {
            (name.to_owned(), Tone { whole, ..Tone::described(description) })
        });
        let mut all = BTreeMap::from(built_in);
        all.extend(own);
        Self(all)
    }

    /// The tone of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Tone> {
        self.0.get(name)
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The name there is that is most like this one.
    #[must_use]
    pub fn nearest(&self, name: &str) -> Option<String> {
        nearest(name, self.names())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Prompt;

    #[test]
    fn a_tone_is_an_instruction_above_the_text_and_the_configurations_own_goes_before_a_built_in_one() {
        let own = Tone { prompt: "Say it like a captain.".to_owned(), ..Tone::described("") };
        let tones = Tones::new(BTreeMap::from([("formal".to_owned(), own)]));
        let request = tones.get("formal").unwrap().request("Der Zug fährt um 9.");
        let Prompt::Chat(messages) = request.prompt else { panic!("a conversation") };
        assert!(messages[0].content.starts_with("Say it like a captain. Keep its language"));
        assert_eq!(messages[1], Message::user("Der Zug fährt um 9."));
        assert_eq!(tones.names().collect::<Vec<_>>(), ["brief", "empathetic", "formal", "friendly"]);
        assert!(tones.get("brief").unwrap().whole && !tones.get("friendly").unwrap().whole);
        assert_eq!(tones.get("freindly"), None);
        assert_eq!(tones.nearest("freindly").as_deref(), Some("friendly"));
    }
}

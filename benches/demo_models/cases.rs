//! What is asked, and what is right: cases.json, as scripts/demo_models/evaluation.py writes it.

use std::path::Path;

use serde::Deserialize;

use super::Result;

#[derive(Debug, Deserialize)]
pub(super) struct Cases {
    pub(super) trained: Vec<Asked>,
    pub(super) paraphrases: Vec<Asked>,
    pub(super) off_topic: Vec<Asked>,
    #[serde(default)]
    pub(super) tones: Vec<Toned>,
    pub(super) speech: Vec<Said>,
    pub(super) unseen_speech: Vec<Said>,
    pub(super) pictures: Vec<Shown>,
    #[serde(default)]
    pub(super) router: Vec<Routed>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Asked {
    pub(super) text: String,
    pub(super) answer: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Toned {
    pub(super) text: String,
    pub(super) tone: String,
    /// Names and numbers.
    pub(super) kept: Vec<String>,
    /// The tone's mark.
    pub(super) begins: String,
    pub(super) ends: String,
    pub(super) said: String,
}

/// A recording and what becomes of it in a whole turn.
#[derive(Debug, Deserialize)]
pub(super) struct Said {
    pub(super) file: String,
    pub(super) text: String,
    pub(super) voice: String,
    pub(super) answer: String,
    pub(super) tone: String,
    pub(super) said: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Shown {
    pub(super) file: String,
    pub(super) asked: String,
    pub(super) text: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Routed {
    pub(super) text: String,
    pub(super) label: String,
}

impl Cases {
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("cases.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            format!("cannot read {}: {error}; scripts/demo_models/make writes it", path.display())
        })?;
        Ok(serde_json::from_str(&text)?)
    }
}

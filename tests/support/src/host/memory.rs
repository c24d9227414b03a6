//! What an Ollama holds in memory and on disk.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// A model of which nothing else is said takes this much.
const SIZE: u64 = 6_600_000_000;

#[derive(Debug, Default)]
pub(super) struct Memory {
    sizes: BTreeMap<String, u64>,
    /// Loaded models, with the time of their expiry in seconds since the host's start.
    loaded: BTreeMap<String, u64>,
    uses: u64,
    most: u64,
    holds_on: bool,
    back: u64,
}

impl Memory {
    pub(super) fn has(&mut self, model: &str, bytes: u64) {
        self.sizes.insert(with_tag(model), bytes);
    }

    pub(super) fn loaded(&self) -> Vec<String> {
        self.loaded.keys().cloned().collect()
    }

    pub(super) fn use_now(&mut self, model: &str) {
        self.uses += 1;
        self.loaded.insert(with_tag(model), self.uses);
        self.most = self.most.max(self.held());
    }

    pub(super) fn unload(&mut self, model: &str) {
        if !self.holds_on {
            self.loaded.remove(&with_tag(model));
        }
    }

    pub(super) fn hold_on(&mut self) {
        self.holds_on = true;
    }

    pub(super) fn jump_back(&mut self) {
        self.back += 1;
    }

    pub(super) fn held(&self) -> u64 {
        self.loaded.keys().map(|model| self.size(model)).sum()
    }

    pub(super) fn most(&self) -> u64 {
        self.most
    }

    /// As `/api/ps` lists them.
    pub(super) fn listed(&self) -> Vec<Value> {
        let model = |(name, expires): (&String, &u64)| {
            let (hours, minutes, seconds) = (12 - self.back, expires / 60, expires % 60);
            json!({
                "name": name, "model": name, "size": self.size(name), "size_vram": 0, "context_length": 4096,
                "digest": "d1ce", "expires_at": format!("2318-01-01T{hours:02}:{minutes:02}:{seconds:02}Z"),
                "details": {"family": "llama"}
            })
        };
        self.loaded.iter().map(model).collect()
    }

    /// As `/api/tags` lists them.
    pub(super) fn on_disk(&self) -> Vec<Value> {
        self.sizes.iter().map(|(name, size)| json!({"name": name, "model": name, "size": size})).collect()
    }

    fn size(&self, name: &str) -> u64 {
        self.sizes.get(name).copied().unwrap_or(SIZE)
    }
}

fn with_tag(model: &str) -> String {
    if model.contains(':') { model.to_owned() } else { format!("{model}:latest") }
}

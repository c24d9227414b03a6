//! A place in the file: where a value is read, and what problems with it are reported under.

use std::path::Path;

use super::tree::Node;

/// A key's path, with the value and the line it has in the file.
#[derive(Clone, Debug)]
pub(super) struct At<'a> {
    /// Such as `models.solar.fallback[1]`; empty for the whole file.
    pub(super) path: String,
    /// The line of the key, or of the nearest key above it that is in the file.
    pub(super) line: usize,
    /// The value; `None` where the file does not have the key.
    pub(super) node: Option<&'a Node>,
    /// The file, where that is not the configuration itself.
    pub(super) file: Option<&'a Path>,
}

impl<'a> At<'a> {
    /// The whole file.
    pub(super) const fn root(node: &'a Node) -> Self {
        Self { path: String::new(), line: node.line, node: Some(node), file: None }
    }

    /// The place of a key below this one.
    pub(super) fn key(&self, key: &str) -> Self {
        let entry = self.node.and_then(|node| node.entry(key));
        Self {
            path: Self::key_path(&self.path, key),
            line: entry.map_or(self.line, |entry| entry.line),
            node: entry.map(|entry| &entry.value),
            file: entry.and_then(|entry| entry.value.file.as_deref()).or(self.file),
        }
    }

    /// The place of a list's item below this one.
    pub(super) fn item(&self, index: usize) -> Self {
        let node = self.node.and_then(|node| node.item(index));
        Self {
            path: Self::item_path(&self.path, index),
            line: node.map_or(self.line, |node| node.line),
            node,
            file: node.and_then(|node| node.file.as_deref()).or(self.file),
        }
    }

    /// The path of `key` below `path`.
    pub(super) fn key_path(path: &str, key: &str) -> String {
        if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
    }

    /// The path of the item at `index` (from 0) below `path`.
    pub(super) fn item_path(path: &str, index: usize) -> String {
        format!("{path}[{index}]")
    }
}

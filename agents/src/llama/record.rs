//! Small files that remember what was measured, for the next time: JSON objects by key, written whole.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{GgufSettings, runtime};

/// A file of one kind of measurement.
#[derive(Debug)]
pub(super) struct Record {
    file: PathBuf,
}

impl Record {
    /// The record `name` where the settings keep measurements; `None` where they keep none.
    pub(super) fn of(settings: &GgufSettings, name: &str) -> Option<Self> {
        settings.measurements.as_ref().map(|folder| Self { file: folder.join(name) })
    }

    /// What is remembered under a key. A file that cannot be read remembers nothing, which is said.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        self.read().remove(key)
    }

    /// Remembers a value. Where it cannot be written, that is said, and it will be measured again.
    pub(super) fn put<T: Serialize + DeserializeOwned>(&self, key: String, value: T) {
        if let Err(error) = self.write(key, value) {
            tracing::warn!(file = %self.file.display(), %error, "what was measured could not be written and will be measured again");
        }
    }

    fn read<T: DeserializeOwned>(&self) -> BTreeMap<String, T> {
        let read = fs::read(&self.file).and_then(|text| Ok(serde_json::from_slice(&text)?));
        read.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(file = %self.file.display(), %error, "what was measured before cannot be read and does not count");
            }
            BTreeMap::new()
        })
    }

    fn write<T: Serialize + DeserializeOwned>(&self, key: String, value: T) -> io::Result<()> {
        static WRITING: Mutex<()> = Mutex::new(());
        let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = self.read();
        all.insert(key, value);
        if let Some(folder) = self.file.parent() {
            fs::create_dir_all(folder)?;
        }
        let unfinished = self.file.with_extension(format!("{}.part", std::process::id()));
        fs::write(&unfinished, serde_json::to_vec_pretty(&all)?)?;
        fs::rename(&unfinished, &self.file)
    }
}

/// A file as it is now, and what is done with it: what a measurement holds for.
pub(super) fn key(settings: &GgufSettings) -> String {
    let threads = settings.threads.unwrap_or_else(runtime::cpus);
    format!("{} {} {threads}", file(&settings.path), settings.purpose)
}

fn file(path: &Path) -> String {
    let file = fs::metadata(path).ok();
    let bytes = file.as_ref().map_or(0, fs::Metadata::len);
    let modified = file.and_then(|file| file.modified().ok());
    format!("{} {bytes} {modified:?}", path.display())
}

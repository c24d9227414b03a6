//! Small files that remember what was measured, for the next time: JSON, written whole. Several processes may use them.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::{GgufSettings, runtime};

/// Of the files' form.
const VERSION: u32 = 2;
/// Entries of a file: with more than these, the oldest are forgotten. Ten files with their contexts are about a hundred.
const MOST: usize = 512;
/// How often a file's lock is tried for, a millisecond apart: whoever has it needs it for as long as a small file takes.
const TRIES: u32 = 1000;

/// A file of one kind of measurement.
#[derive(Debug)]
pub(super) struct Record {
    file: PathBuf,
}

/// A file's text.
#[derive(Debug, Serialize, Deserialize)]
struct Contents<T> {
    version: u32,
    /// What is remembered by key, the latest last.
    entries: Vec<(String, T)>,
}

/// What a file of any version has.
#[derive(Debug, Deserialize)]
struct Versioned {
    version: u32,
}

impl Record {
    /// The record `name` where the settings keep measurements; `None` where they keep none.
    pub(super) fn of(settings: &GgufSettings, name: &str) -> Option<Self> {
        settings.measurements.as_ref().map(|folder| Self { file: folder.join(name) })
    }

    /// What is remembered under a key. A file that cannot be read remembers nothing, which is said once.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        self.read().into_iter().find(|(own, _)| own == key).map(|(_, value)| value)
    }

    /// Everything that is remembered, by key.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Vec<(String, T)> {
        let read = fs::read(&self.file).and_then(|text| {
            let Versioned { version } = serde_json::from_slice(&text)?;
            if version != VERSION {
                return Err(io::Error::other(format!("it is of version {version}, not {VERSION}")));
            }
            Ok(serde_json::from_slice::<Contents<T>>(&text)?.entries)
        });
        read.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound && self.first_time("read") {
                tracing::warn!(file = %self.file.display(), %error, "what was measured before cannot be read and does not count");
            }
            Vec::new()
        })
    }

    /// Remembers a value. Where it cannot be written, that is said once, and it will be measured again.
    pub(super) fn put<T: Serialize + DeserializeOwned>(&self, key: String, value: T) {
        self.change(key, |_| value);
    }

    /// Remembers what comes of what is remembered, with no other process in between.
    pub(super) fn change<T: Serialize + DeserializeOwned>(
        &self,
        key: String,
        change: impl FnOnce(Option<T>) -> T,
    ) {
        if let Err(error) = self.write(key, change)
            && self.first_time("write")
        {
            tracing::warn!(file = %self.file.display(), %error, "what was measured could not be written and will be measured again");
        }
    }

    fn write<T: Serialize + DeserializeOwned>(
        &self,
        key: String,
        change: impl FnOnce(Option<T>) -> T,
    ) -> io::Result<()> {
        if let Some(folder) = self.file.parent() {
            fs::create_dir_all(folder)?;
        }
        let _locked = self.lock()?;
        let mut entries = self.read();
        let before = entries.iter().position(|(own, _)| *own == key).map(|at| entries.remove(at).1);
        entries.push((key, change(before)));
        let forgotten = entries.len().saturating_sub(MOST);
        entries.drain(..forgotten);
        let unfinished = self.file.with_extension(format!("{}.part", std::process::id()));
        let text = serde_json::to_vec_pretty(&Contents { version: VERSION, entries })?;
        let written = fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, &self.file));
        if written.is_err() {
            // What led here is reported.
            let _gone = fs::remove_file(&unfinished);
        }
        written
    }

    /// Keeps everybody else, in this process and others, from writing until the file is dropped.
    fn lock(&self) -> io::Result<File> {
        let path = self.file.with_extension("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        for _ in 0..TRIES {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                #[expect(clippy::disallowed_methods, reason = "nothing tells when another process lets go")]
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "another process does not let go of its lock"))
    }

    /// Whether something is said of the file for the first time.
    fn first_time(&self, what: &'static str) -> bool {
        static SAID: Mutex<BTreeSet<(PathBuf, &str)>> = Mutex::new(BTreeSet::new());
        SAID.lock().unwrap_or_else(PoisonError::into_inner).insert((self.file.clone(), what))
    }
}

/// A number for a file as it is now, the same in every process.
pub(super) fn number(path: &Path) -> u64 {
    xxh3_64(file(path).as_bytes())
}

/// A file as it is now, what is done with it, and what does it: what a measurement holds for.
pub(super) fn key(settings: &GgufSettings) -> String {
    let threads = settings.threads.unwrap_or_else(runtime::cpus);
    let (file, purpose, engine) = (file(&settings.path), settings.purpose, runtime::engine());
    format!("{file} {purpose} {threads} {engine}")
}

fn file(path: &Path) -> String {
    let file = fs::metadata(path).ok();
    let bytes = file.as_ref().map_or(0, fs::Metadata::len);
    let modified = file.and_then(|file| file.modified().ok());
    format!("{} {bytes} {modified:?}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(folder: &Path) -> Record {
        Record { file: folder.join("state/numbers.json") }
    }

    #[test]
    fn what_several_write_at_once_is_all_remembered() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                let record = record(folder.path());
                scope.spawn(move || {
                    for n in 0..10_u32 {
                        record.put(format!("{thread} {n}"), n);
                        record.change("sum".to_owned(), |sum: Option<u32>| sum.unwrap_or(0) + n);
                    }
                });
            }
        });
        let all = record(folder.path()).read::<u32>();
        assert_eq!((all.len(), record(folder.path()).get("sum")), (41, Some(4 * 45_u32)));
        let left: Vec<_> = fs::read_dir(folder.path().join("state")).unwrap().flatten().collect();
        assert_eq!(left.len(), 2, "the file and its lock: {left:?}");
    }

    #[test]
    fn the_oldest_entries_are_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(folder.path());
        for n in 0..MOST {
            record.put(n.to_string(), n);
        }
        record.put("0".to_owned(), 7_usize);
        record.put("new".to_owned(), 8_usize);
        let kept = [("0", Some(7)), ("1", None), ("2", Some(2)), ("new", Some(8))];
        for (key, value) in kept {
            assert_eq!(record.get::<usize>(key), value, "{key}");
        }
        assert_eq!(record.read::<usize>().len(), MOST);
    }

    #[test]
    fn a_file_that_is_damaged_or_of_another_version_does_not_count_and_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(folder.path());
        record.put("key".to_owned(), 1_u32);
        let damages: [&[u8]; 6] = [
            b"{",
            b"[1]",
            b"\xff\xfe",
            br#"{"key": 1}"#,
            br#"{"version": 99, "entries": [["key", 1]]}"#,
            br#"{"version": 2, "entries": [["key", "many"]]}"#,
        ];
        for damage in damages {
            fs::write(&record.file, damage).unwrap();
            assert_eq!(record.get::<u32>("key"), None, "{damage:?}");
            record.put("key".to_owned(), 2_u32);
            assert_eq!(record.get::<u32>("key"), Some(2), "{damage:?}");
        }
        assert!(!record.first_time("read") && record.first_time("write"), "it was said once");
    }

    #[test]
    fn a_folder_that_cannot_be_written_to_is_said_once_and_nothing_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let record = record(folder.path());
        fs::write(folder.path().join("state"), "not a folder").unwrap();
        for _ in 0..3 {
            record.put("key".to_owned(), 1_u32);
            assert_eq!(record.get::<u32>("key"), None);
        }
        assert!(!record.first_time("write"));
    }

    #[test]
    fn the_key_names_the_engine_that_is_built_in() {
        let version = runtime::LLAMA_CPP.strip_prefix("llama-cpp-sys-2 ").unwrap();
        assert!(
            include_str!("../../Cargo.toml")
                .contains(&format!(r#"llama-cpp-sys-2 = {{ version = "={version}""#))
        );
        let key = key(&GgufSettings::new("m.gguf", sarai_core::request::Capability::Embed));
        assert!(key.contains(runtime::LLAMA_CPP) && key.contains(std::env::consts::ARCH), "{key}");
    }
}

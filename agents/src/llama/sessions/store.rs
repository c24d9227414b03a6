//! The folder of the session store: who gets room in it, and what is removed from it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use sarai_core::units::Bytes;

/// Whoever has written to an unfinished session longer ago than this does not write to it any more.
const LONGEST_WRITE: Duration = Duration::from_hours(1);

/// A folder for the sessions of all models, limited in size. Several processes may use it: while more than one of them
/// writes, it may hold more for a moment.
#[derive(Debug)]
pub struct SessionStore {
    folder: PathBuf,
    most: Bytes,
    tidying: Mutex<Tidying>,
}

/// Held while files are removed or counted.
#[derive(Debug, Default)]
struct Tidying {
    /// Room that was given out, and is not filled by whole sessions yet.
    given: Bytes,
    /// Files that are none of the store's, and were told of.
    told: BTreeSet<PathBuf>,
}

/// Room in the store for a session that is being written.
#[derive(Debug)]
pub(super) struct Room {
    store: Arc<SessionStore>,
    bytes: Bytes,
}

/// What the folder holds.
#[derive(Debug, Default)]
struct Held {
    /// Whole sessions: their age, the file of the state, and the bytes of both files.
    sessions: Vec<(SystemTime, PathBuf, Bytes)>,
    /// What other processes are just writing.
    unfinished: Bytes,
}

impl SessionStore {
    /// A store in `folder`, which is made when it is first written to. Holds at most `most`, the oldest going first.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>, most: Bytes) -> Arc<Self> {
        Arc::new(Self { folder: folder.into(), most, tidying: Mutex::default() })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn keeps_none(&self) -> bool {
        self.most == Bytes::ZERO
    }

    /// The descriptions that are there.
    pub(super) fn descriptions(&self) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| has_end(path, "json")).collect()
    }

    /// Room for so many bytes, for which the oldest sessions are removed; `None` where there is none.
    pub(super) fn room(self: &Arc<Self>, bytes: Bytes) -> Option<Room> {
        let mut tidying = self.lock();
        if bytes > self.most || !self.tidy(&mut tidying, bytes) {
            return None;
        }
        tidying.given += bytes;
        Some(Room { store: Arc::clone(self), bytes })
    }

    /// Removes what is left of sessions that nobody finishes any more, and of whole ones the oldest while there are too
    /// many.
    pub(super) fn tidy_up(&self) {
        let _there_is_room = self.tidy(&mut self.lock(), Bytes::ZERO);
    }

    /// The same, with room for `coming`; returns whether there is.
    fn tidy(&self, tidying: &mut Tidying, coming: Bytes) -> bool {
        let Held { mut sessions, unfinished } = self.held(&mut tidying.told);
        sessions.sort();
        let coming = tidying.given + unfinished + coming;
        let mut held: Bytes = sessions.iter().map(|(_, _, bytes)| *bytes).sum();
        for (_, state, bytes) in sessions {
            if held + coming <= self.most {
                break;
            }
            remove(&state);
            held = held - bytes;
        }
        held + coming <= self.most
    }

    /// What there is, without what a process that was killed in the middle of a session has left: that is removed.
    fn held(&self, told: &mut BTreeSet<PathBuf>) -> Held {
        let mut held = Held::default();
        let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let (path, Ok(file)) = (entry.path(), entry.metadata()) else { continue };
            let modified = file.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let is_old = modified.elapsed().is_ok_and(|age| age > LONGEST_WRITE);
            let (state, description) = (path.with_extension("kv"), path.with_extension("json"));
            match path.extension().and_then(|end| end.to_str()) {
                Some("kv") if is_old && !description.exists() => remove_file(&path),
                Some("kv") => {
                    held.sessions.push((modified, path, Bytes(file.len() + size(&description))));
                }
                // The state is there before it, and goes after it.
                Some("json") if !state.exists() => remove_file(&path),
                Some("json") => {}
                Some("part") if is_old => remove_file(&path),
                // This process's own have been given room.
                Some("part") if is_own(&path) => {}
                Some("part") => held.unfinished += Bytes(file.len()),
                _ => {
                    if told.insert(path.clone()) {
                        tracing::warn!(file = %path.display(), "a file that is no session is ignored");
                    }
                }
            }
        }
        held
    }

    fn lock(&self) -> MutexGuard<'_, Tidying> {
        // Nothing panics while it is held.
        self.tidying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut tidying = self.store.lock();
        tidying.given = tidying.given.saturating_sub(self.bytes);
    }
}

/// A file under another name, which is removed unless it is finished.
pub(super) struct Unfinished {
    pub(super) path: PathBuf,
    name: PathBuf,
    finished: bool,
}

impl Unfinished {
    pub(super) fn new(name: &Path) -> Self {
        // Two engines of this process may be writing the same conversation.
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut path = name.as_os_str().to_owned();
        path.push(format!("{}{}.part", own_mark(), COUNT.fetch_add(1, Ordering::Relaxed)));
        Self { path: path.into(), name: name.to_owned(), finished: false }
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.name)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            // What led here is reported already.
            let _gone = fs::remove_file(&self.path);
        }
    }
}

/// What this process's unfinished files have in their names.
fn own_mark() -> String {
    format!(".{}-", std::process::id())
}

fn is_own(unfinished: &Path) -> bool {
    unfinished.file_name().is_some_and(|name| name.to_string_lossy().contains(&own_mark()))
}

/// Removes a session.
pub(super) fn remove(state: &Path) {
    remove_file(&state.with_extension("json"));
    remove_file(state);
}

/// A file that is gone already is as good.
fn remove_file(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(session = %path.display(), %error, "a session could not be removed");
    }
}

fn has_end(path: &Path, end: &str) -> bool {
    path.extension().is_some_and(|extension| extension == end)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// A store of 1000 bytes, with files of 100 bytes in it that were written one after another, long ago or just now.
    fn store(files: &[(&str, bool)]) -> (tempfile::TempDir, Arc<SessionStore>) {
        let folder = tempfile::tempdir().unwrap();
        for (number, (name, long_ago)) in (0..).zip(files) {
            let path = folder.path().join(name);
            fs::write(&path, [0; 100]).unwrap();
            let ago = Duration::from_secs(if *long_ago { 7200 } else { 600 });
            let at = SystemTime::now() - ago + Duration::from_secs(number);
            File::options().append(true).open(&path).unwrap().set_modified(at).unwrap();
        }
        let store = SessionStore::new(folder.path(), Bytes(1000));
        (folder, store)
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn room_is_what_the_oldest_sessions_leave_and_is_given_once() {
        let (folder, store) =
            store(&[("a.kv", false), ("a.json", false), ("b.kv", false), ("b.json", false)]);
        let first = store.room(Bytes(700)).unwrap();
        assert_eq!(names(folder.path()), ["b.json", "b.kv"], "descriptions take room, too");
        assert!(store.room(Bytes(400)).is_none(), "700 bytes are another session's");
        drop(first);
        assert!(store.room(Bytes(1000)).is_some());
        assert!(store.room(Bytes(1001)).is_none());
    }

    #[test]
    fn what_others_write_counts_and_what_nobody_finishes_is_removed() {
        let own = format!("d.kv{}7.part", own_mark());
        let (folder, store) = store(&[
            ("killed.kv.1-0.part", true),
            ("other.kv.1-0.part", false),
            ("undescribed.kv", true),
            ("just.kv", false),
            ("stateless.json", false),
            ("notes.txt", true),
            (&own, false),
        ]);
        assert!(store.room(Bytes(901)).is_none());
        assert_eq!(names(folder.path()), [own.as_str(), "notes.txt", "other.kv.1-0.part"]);
        assert!(store.room(Bytes(900)).is_some());
    }

    #[test]
    fn two_unfinished_files_of_one_name_are_two() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("a.kv");
        let (one, two) = (Unfinished::new(&name), Unfinished::new(&name));
        assert_ne!(one.path, two.path);
        fs::write(&one.path, "1").unwrap();
        fs::write(&two.path, "2").unwrap();
        one.finish().unwrap();
        drop(two);
        assert_eq!(
            (names(folder.path()), fs::read(&name).unwrap()),
            (vec!["a.kv".to_owned()], b"1".to_vec())
        );
    }
}

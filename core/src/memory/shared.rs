//! A budget that several processes of one user share, with nobody between them: each writes down what it holds and what it
//! waits for, in a folder that all can see, and takes more only where the others leave room.
//!
//! Each process has a file there and keeps it locked for as long as it lives. The lock goes with the process, however that
//! ends: a file that can be locked is a dead one's, and whoever finds it removes it. Another lock is held for the moment
//! in which the files are read and changed.
//!
//! The folder, or a file in it, may be removed while processes live: whoever finds its own file gone writes it anew.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// A process's share of a common budget.
#[derive(Debug)]
pub struct SharedBudget {
    folder: PathBuf,
    path: PathBuf,
    file: File,
    own: Share,
    others: Seen,
}

/// What the others have written down, by file.
#[derive(Debug, Default)]
struct Seen(BTreeMap<PathBuf, Written>);

/// A living process's file as it was last read.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    share: Share,
    /// Whether it cannot be read now, which was said. What it said last counts.
    damaged: bool,
}

/// What a process has written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Share {
    /// What it holds for models.
    held: u64,
    /// What it would hold besides for the first load that waits; 0 where none does.
    wanted: u64,
    /// Whose turn it is: the lowest of those who want something comes first.
    turn: u64,
}

/// What the other processes have of the common budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// What they hold.
    pub held: Bytes,
    /// What those among them wait for whose turn is before this process's.
    pub first: Bytes,
}

impl Others {
    /// What is not this process's to take.
    #[must_use]
    pub fn taken(&self) -> Bytes {
        self.held + self.first
    }
}

/// How often the common lock is tried for, a millisecond apart: whoever has it needs it for less than one. What can be done
/// a second later as well is tried for less often than what a load begins with.
const TRIES: u32 = 2;
const TRIES_TO_HOLD: u32 = 50;

impl SharedBudget {
    /// Takes part in the budget that is kept in `folder`, holding nothing yet. The folder is made where it is not there.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn join(folder: impl Into<PathBuf>) -> io::Result<Self> {
        let folder = folder.into();
        let _locked = lock(&folder, TRIES_TO_HOLD)?;
        let mut others = Seen::default();
        // What dead processes of the same number have left is removed by this.
        others.read(&folder, None)?;
        let (path, file) = enter(&folder)?;
        let mut joined = Self { folder, path, file, own: Share::default(), others };
        joined.write()?;
        Ok(joined)
    }

    /// Holds so much in all from now on, where the others leave so much of `budget`; else nothing changes, and what they
    /// have is returned. Holding less than before is always possible.
    ///
    /// # Errors
    /// The folder cannot be read or written to.
    pub fn hold(&mut self, bytes: Bytes, budget: Bytes) -> io::Result<Result<(), Others>> {
        let _locked = self.lock(TRIES_TO_HOLD)?;
        let others = self.see_others()?;
        if bytes.0 > self.own.held && others.taken() + bytes > budget {
            return Ok(Err(others));
        }
        self.own.held = bytes.0;
        self.write()?;
        Ok(Ok(()))
    }

    /// Writes down what this process holds, whatever the others have, and what it waits for.
    ///
    /// # Errors
    /// The folder cannot be read or written to.
    pub fn state(&mut self, held: Bytes, wanted: Bytes) -> io::Result<()> {
        let _locked = self.lock(TRIES)?;
        let turn = match (wanted.0, self.own.turn) {
            (0, _) => 0,
            (_, 0) => {
                self.others.read(&self.folder, Some(&self.path))?;
                self.others.shares().map(|share| share.turn).max().unwrap_or(0).saturating_add(1)
            }
            (_, turn) => turn,
        };
        let own = Share { held: held.0, wanted: wanted.0, turn };
        if own != self.own {
            self.own = own;
            self.write()?;
        }
        Ok(())
    }

    /// What the others have now.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn others(&mut self) -> io::Result<Others> {
        let _locked = self.lock(TRIES)?;
        self.see_others()
    }

    fn see_others(&mut self) -> io::Result<Others> {
        self.others.read(&self.folder, Some(&self.path))?;
        let before = |share: &&Share| self.own.turn == 0 || share.turn < self.own.turn;
        Ok(Others {
            held: self.others.shares().map(|share| Bytes(share.held)).sum(),
            first: self.others.shares().filter(before).map(|share| Bytes(share.wanted)).sum(),
        })
    }

    /// Locks the folder until the file is dropped, with the own file in it.
    fn lock(&mut self, tries: u32) -> io::Result<File> {
        let locked = lock(&self.folder, tries)?;
        if !is_at(&self.file, &self.path)? {
            (self.path, self.file) = enter(&self.folder)?;
            self.write()?;
        }
        Ok(locked)
    }

    fn write(&mut self) -> io::Result<()> {
        let text = serde_json::to_vec(&self.own)?;
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&text)
    }
}

impl Drop for SharedBudget {
    fn drop(&mut self) {
        // What stays is found to be a dead process's.
        let _gone = fs::remove_file(&self.path);
    }
}

/// Locks the folder, which is made where it is not there, until the file is dropped.
fn lock(folder: &Path, tries: u32) -> io::Result<File> {
    let path = folder.join("lock");
    let open = || OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    for attempt in 1.. {
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make(folder)?;
                open()?
            }
            opened => opened?,
        };
        match file.try_lock() {
            // Another one's folder by now, where it was removed and made again.
            Ok(()) if is_at(&file, &path)? => return Ok(file),
            Ok(()) | Err(TryLockError::WouldBlock) if attempt < tries => {}
            Ok(()) | Err(TryLockError::WouldBlock) => break,
            Err(TryLockError::Error(error)) => return Err(error),
        }
        #[expect(clippy::disallowed_methods, reason = "nothing tells when another process lets go")]
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(io::Error::new(io::ErrorKind::WouldBlock, "another process does not let go of its lock"))
}

/// Nobody else's business.
fn make(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// A new file for this process in the folder, which is locked.
fn enter(folder: &Path) -> io::Result<(PathBuf, File)> {
    for number in 0..u32::MAX {
        let path = folder.join(format!("{}-{number}.share", std::process::id()));
        match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => {
                file.lock()?;
                return Ok((path, file));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Whether an open file is still the one at its path.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let there = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        there => there?,
    };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let own = file.metadata()?;
        Ok((own.dev(), own.ino()) == (there.dev(), there.ino()))
    }
    // Elsewhere an open file cannot be replaced.
    #[cfg(not(unix))]
    {
        let _ = file;
        Ok(there.is_file())
    }
}

impl Seen {
    fn shares(&self) -> impl Iterator<Item = &Share> {
        self.0.values().map(|written| &written.share)
    }

    /// Reads what the living have written down, `own` excepted; removes what the dead have left. The folder is locked. Of a
    /// file that cannot be read, what it said last counts.
    fn read(&mut self, folder: &Path, own: Option<&Path>) -> io::Result<()> {
        let mut now = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_none_or(|end| end != "share") || Some(path.as_path()) == own {
                continue;
            }
            let mut file = match File::open(&path) {
                Ok(file) => file,
                // Its process has just left.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            match file.try_lock() {
                Ok(()) => match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => continue,
                },
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error),
            }
            let mut text = Vec::new();
            let read = file.read_to_end(&mut text);
            let share = read.and_then(|_| Ok(serde_json::from_slice::<Share>(&text)?));
            let before = self.0.get(&path).copied().unwrap_or_default();
            let written = match share {
                Ok(share) => Written { share, damaged: false },
                Err(error) => {
                    if !before.damaged {
                        let held = Bytes(before.share.held);
                        tracing::warn!(
                            file = %path.display(), %error, %held,
                            "what another process holds of the shared budget cannot be read: what it said last counts"
                        );
                    }
                    Written { damaged: true, ..before }
                }
            };
            now.insert(path, written);
        }
        self.0 = now;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(others: Result<(), Others>) -> Bytes {
        others.unwrap_err().taken()
    }

    #[test]
    fn together_they_hold_no_more_than_the_budget() {
        let folder = tempfile::tempdir().unwrap();
        let join = || SharedBudget::join(folder.path().join("budget")).unwrap();
        let (mut first, mut second) = (join(), join());
        let budget = Bytes(100);
        assert_eq!(first.hold(Bytes(60), budget).unwrap(), Ok(()));
        assert_eq!(taken(second.hold(Bytes(50), budget).unwrap()), Bytes(60));
        assert_eq!(second.hold(Bytes(40), budget).unwrap(), Ok(()));
        assert_eq!(first.hold(Bytes(61), budget).unwrap().unwrap_err().held, Bytes(40));
        first.state(Bytes(10), Bytes::ZERO).unwrap();
        assert_eq!(second.hold(Bytes(90), budget).unwrap(), Ok(()));
        // More than the budget is held where that turned out to be so, and then only less is possible.
        first.state(Bytes(30), Bytes::ZERO).unwrap();
        assert_eq!(second.hold(Bytes(80), budget).unwrap(), Ok(()));
    }

    #[test]
    fn who_waits_first_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let join = || SharedBudget::join(folder.path()).unwrap();
        let (mut first, mut second, mut idle) = (join(), join(), join());
        let budget = Bytes(100);
        idle.state(Bytes(80), Bytes::ZERO).unwrap();
        first.state(Bytes::ZERO, Bytes(50)).unwrap();
        second.state(Bytes::ZERO, Bytes(30)).unwrap();
        let first_of = |share: &mut SharedBudget| share.others().unwrap().first.0;
        assert_eq!((first_of(&mut first), first_of(&mut second), first_of(&mut idle)), (0, 50, 80));
        idle.state(Bytes::ZERO, Bytes::ZERO).unwrap();
        assert_eq!(
            taken(second.hold(Bytes(60), budget).unwrap()),
            Bytes(50),
            "the other one's turn is before"
        );
        assert_eq!(first.hold(Bytes(50), budget).unwrap(), Ok(()));
        first.state(Bytes(50), Bytes::ZERO).unwrap();
        assert_eq!(second.hold(Bytes(30), budget).unwrap(), Ok(()));
    }

    #[test]
    fn what_the_dead_held_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let mut own = SharedBudget::join(folder.path()).unwrap();
        let dead = folder.path().join("1-0.share");
        fs::write(&dead, r#"{"held":90,"wanted":0,"turn":0}"#).unwrap();
        assert_eq!(own.hold(Bytes(50), Bytes(100)).unwrap(), Ok(()));
        assert!(!dead.exists());
        let left = SharedBudget::join(folder.path()).unwrap();
        let path = left.path.clone();
        drop(left);
        assert!(!path.exists());
    }

    #[test]
    fn of_a_living_process_whose_file_is_damaged_what_it_said_last_counts() {
        let folder = tempfile::tempdir().unwrap();
        let mut own = SharedBudget::join(folder.path()).unwrap();
        let mut other = SharedBudget::join(folder.path()).unwrap();
        other.state(Bytes(70), Bytes::ZERO).unwrap();
        assert_eq!(own.others().unwrap().held, Bytes(70));
        for damage in [&b"{"[..], b"", b"[1]", b"\xff\xfe"] {
            fs::write(&other.path, damage).unwrap();
            assert_eq!(taken(own.hold(Bytes(50), Bytes(100)).unwrap()), Bytes(70));
        }
        // It writes again, and is believed again.
        other.state(Bytes(40), Bytes::ZERO).unwrap();
        assert_eq!(own.hold(Bytes(50), Bytes(100)).unwrap(), Ok(()));
        // Nobody knows what a stranger holds.
        let strange = File::create(folder.path().join("1-0.share")).unwrap();
        strange.lock().unwrap();
        assert_eq!(own.others().unwrap().held, Bytes(40));
    }

    #[test]
    fn a_folder_that_was_removed_is_made_again_by_those_who_share_it() {
        let above = tempfile::tempdir().unwrap();
        let folder = above.path().join("run/budget");
        let (mut first, mut second) =
            (SharedBudget::join(&folder).unwrap(), SharedBudget::join(&folder).unwrap());
        first.state(Bytes(70), Bytes::ZERO).unwrap();
        fs::remove_dir_all(above.path().join("run")).unwrap();
        assert_eq!(second.others().unwrap().held, Bytes::ZERO, "the other has not come back yet");
        assert_eq!(first.others().unwrap(), Others::default());
        assert_eq!(taken(second.hold(Bytes(50), Bytes(100)).unwrap()), Bytes(70));
        // The same where only its file is gone, or another one is in its place.
        fs::remove_file(&first.path).unwrap();
        first.others().unwrap();
        assert_eq!(second.others().unwrap().held, Bytes(70));
        fs::remove_file(&second.path).unwrap();
        fs::write(&second.path, "{}").unwrap();
        second.state(Bytes(20), Bytes::ZERO).unwrap();
        assert_eq!(first.others().unwrap().held, Bytes(20));
    }

    #[test]
    fn a_lock_that_somebody_keeps_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut own = SharedBudget::join(folder.path()).unwrap();
        let kept = File::open(folder.path().join("lock")).unwrap();
        kept.lock().unwrap();
        let began = std::time::Instant::now();
        assert_eq!(own.others().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(own.hold(Bytes(1), Bytes(2)).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        drop(kept);
        assert_eq!(own.hold(Bytes(1), Bytes(2)).unwrap(), Ok(()));
    }
}

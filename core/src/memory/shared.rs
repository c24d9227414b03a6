//! A budget that several processes of one user share, with nobody between them: each writes down what it holds and what it
//! waits for, in a folder that all can see, and takes more only where the others leave room.
//!
//! Each process has a file there and keeps it locked for as long as it lives. The lock goes with the process, however that
//! ends: a file that can be locked is a dead one's, and whoever finds it removes it. Another lock is held for the moment
//! in which the files are read and changed.

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

/// How often the common lock is tried for, a millisecond apart: whoever has it needs it for less than one.
const TRIES: u32 = 50;

impl SharedBudget {
    /// Takes part in the budget that is kept in `folder`, holding nothing yet. The folder is made where it is not there.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn join(folder: impl Into<PathBuf>) -> io::Result<Self> {
        let folder = folder.into();
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&folder)?;
        let _locked = lock(&folder)?;
        // What dead processes of the same number have left is removed by this.
        shares(&folder, None)?;
        for number in 0..u32::MAX {
            let path = folder.join(format!("{}-{number}.share", std::process::id()));
            let file = match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            file.lock()?;
            let mut joined = Self { folder, path, file, own: Share::default() };
            joined.write()?;
            drop(_locked);
            return Ok(joined);
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Holds so much in all from now on, where the others leave so much of `budget`; else nothing changes, and what they
    /// have is returned. Holding less than before is always possible.
    ///
    /// # Errors
    /// The folder cannot be read or written to.
    pub fn hold(&mut self, bytes: Bytes, budget: Bytes) -> io::Result<Result<(), Others>> {
        let _locked = lock(&self.folder)?;
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
        let _locked = lock(&self.folder)?;
        let turn = match (wanted.0, self.own.turn) {
            (0, _) => 0,
            (_, 0) => {
                shares(&self.folder, Some(&self.path))?.iter().map(|share| share.turn).max().unwrap_or(0) + 1
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
    pub fn others(&self) -> io::Result<Others> {
        let _locked = lock(&self.folder)?;
        self.see_others()
    }

    fn see_others(&self) -> io::Result<Others> {
        let shares = shares(&self.folder, Some(&self.path))?;
        let before = |share: &&Share| self.own.turn == 0 || share.turn < self.own.turn;
        Ok(Others {
            held: shares.iter().map(|share| Bytes(share.held)).sum(),
            first: shares.iter().filter(before).map(|share| Bytes(share.wanted)).sum(),
        })
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

/// Locks the folder until the file is dropped.
fn lock(folder: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("lock"))?;
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

/// What the living have written down, `own` excepted; removes what the dead have left. The folder is locked.
fn shares(folder: &Path, own: Option<&Path>) -> io::Result<Vec<Share>> {
    let mut shares = Vec::new();
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
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let damaged =
            |error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()));
        shares.push(serde_json::from_str(&text).map_err(damaged)?);
    }
    Ok(shares)
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
        let first_of = |share: &SharedBudget| share.others().unwrap().first.0;
        assert_eq!((first_of(&first), first_of(&second), first_of(&idle)), (0, 50, 80));
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
    fn what_the_dead_held_is_free_and_a_strange_file_is_an_error() {
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
        let strange = File::create(&dead).unwrap();
        strange.lock().unwrap();
        let error = own.others().unwrap_err();
        assert!(error.to_string().contains("1-0.share"), "{error}");
    }
}

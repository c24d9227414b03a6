//! The session store: what was computed of conversations, on disk, for when their model is loaded again.
//!
//! A session is two files. `<name>.kv` holds a sequence as llama.cpp writes it; `<name>.json` says of which model and
//! settings, which tokens, and the other file's length and checksum. The second one is written last, under another name,
//! and renamed: a session without it does not exist. Nothing that does not fit its description is given to llama.cpp.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use llama_cpp_2::token::LlamaToken;
use sarai_core::config::KvCacheType;
use sarai_core::units::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::GgufSettings;
use super::context::{Context, SeqId};
use super::engine::reusable;
use super::header::Header;
use crate::Error;

/// Of this form of session, and of the state that this llama.cpp writes.
const VERSION: &str = concat!("3/", "llama-cpp-sys-2 0.1.161");
/// Shorter conversations are computed again as quickly.
const LEAST_TOKENS: usize = 32;
/// Whoever has written to an unfinished session longer ago than this does not write to it any more.
const LONGEST_WRITE: Duration = Duration::from_hours(1);

/// A folder for the sessions of all models, limited in size. Several processes may use it.
#[derive(Debug)]
pub struct SessionStore {
    folder: PathBuf,
    most: Bytes,
    /// Held while files are removed or counted.
    tidying: Mutex<()>,
}

impl SessionStore {
    /// A store in `folder`, which is made when it is first written to. Holds at most `most`, the oldest going first.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>, most: Bytes) -> Arc<Self> {
        Arc::new(Self { folder: folder.into(), most, tidying: Mutex::new(()) })
    }

    /// Removes the oldest sessions until there is room for `coming`; returns whether there is.
    fn make_room(&self, coming: Bytes) -> bool {
        let _tidying = self.tidying.lock().unwrap_or_else(PoisonError::into_inner);
        if coming > self.most {
            return false;
        }
        let mut states: Vec<(SystemTime, PathBuf, Bytes)> = fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let metadata = entry.metadata().ok()?;
                let is_state = entry.path().extension().is_some_and(|end| end == "kv");
                is_state.then(|| {
                    (
                        metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                        entry.path(),
                        Bytes(metadata.len()),
                    )
                })
            })
            .collect();
        states.sort();
        self.remove_unfinished();
        let mut held: Bytes = states.iter().map(|(_, _, bytes)| *bytes).sum();
        for (_, path, bytes) in states {
            if held + coming <= self.most {
                break;
            }
            remove(&path);
            held = held - bytes;
        }
        true
    }
}

impl SessionStore {
    /// Removes what a process that was killed in the middle of a session has left.
    fn remove_unfinished(&self) {
        let old = |path: &Path| {
            let modified = fs::metadata(path).and_then(|file| file.modified()).ok();
            modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > LONGEST_WRITE)
        };
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()).filter(|path| has_end(path, "part") && old(path)) {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(file = %path.display(), %error, "an unfinished session could not be removed");
            }
        }
    }
}

/// What a session belongs to: a state of another file, or made with other settings, means something else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    version: String,
    model: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
    /// Adapters change what is computed.
    adapters: Vec<(PathBuf, String)>,
    /// Some models turn their keys in another way in a context that is longer than the one they were first trained for.
    long_context: bool,
    kv_cache_type: KvCacheType,
}

/// `<name>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Description {
    owner: Owner,
    tokens: Vec<i32>,
    bytes: u64,
    xxh3: u64,
}

/// A session that is known to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Session {
    state: PathBuf,
    tokens: Vec<LlamaToken>,
    bytes: u64,
    xxh3: u64,
}

impl Session {
    /// How many tokens it holds.
    pub(super) fn tokens(&self) -> usize {
        self.tokens.len()
    }
}

/// The sessions of one model with its settings.
#[derive(Debug)]
pub(super) struct Sessions {
    store: Arc<SessionStore>,
    owner: Owner,
    known: Vec<Session>,
    whole: bool,
}

impl Sessions {
    /// Looks for a model's sessions. `whole` says that its states cannot be cut.
    pub(super) fn open(settings: &GgufSettings, header: &Header, n_ctx: u32, whole: bool) -> Option<Self> {
        let store = settings.sessions.clone().filter(|store| store.most > Bytes::ZERO)?;
        let metadata = fs::metadata(&settings.path).ok()?;
        let owner = Owner {
            version: VERSION.to_owned(),
            model: fs::canonicalize(&settings.path).ok()?,
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
            adapters: settings
                .lora
                .iter()
                .map(|(path, scale)| (path.clone(), adapter(path, *scale)))
                .collect(),
            long_context: header
                .int("{arch}.rope.scaling.original_context_length")
                .is_some_and(|original| u64::from(n_ctx) > original),
            kv_cache_type: settings.kv_cache_type,
        };
        let mut sessions = Self { store, owner, known: Vec::new(), whole };
        sessions.known = sessions.find();
        Some(sessions)
    }

    fn find(&self) -> Vec<Session> {
        let Ok(entries) = fs::read_dir(&self.store.folder) else { return Vec::new() };
        let described = entries.flatten().map(|entry| entry.path()).filter(|path| has_end(path, "json"));
        let mut found: Vec<Session> = described.filter_map(|path| self.read(&path)).collect();
        found.sort_by(|a, b| a.state.cmp(&b.state));
        found
    }

    /// A session by its description; none where that is another model's or no description.
    fn read(&self, path: &Path) -> Option<Session> {
        let text = fs::read(path).ok()?;
        let description: Description = match serde_json::from_slice(&text) {
            Ok(description) => description,
            Err(error) => {
                tracing::warn!(session = %path.display(), %error, "a damaged session is ignored");
                return None;
            }
        };
        if description.owner != self.owner {
            return None;
        }
        let Description { tokens, bytes, xxh3, .. } = description;
        let tokens = tokens.into_iter().map(LlamaToken).collect();
        Some(Session { state: path.with_extension("kv"), tokens, bytes, xxh3 })
    }

    /// The session that helps most with a prompt and fits a context of `n_ctx`, and how many tokens it saves.
    pub(super) fn best(&mut self, prompt: &[LlamaToken], n_ctx: usize) -> Option<(Session, usize)> {
        self.forget_removed();
        let help = |session: &Session| reusable(&session.tokens, prompt, self.whole);
        let fitting = self.known.iter().filter(|session| session.tokens.len() < n_ctx);
        let (session, length) =
            fitting.map(|session| (session, help(session))).max_by_key(|(_, length)| *length)?;
        (length > 0).then(|| (session.clone(), length))
    }

    /// Puts a session into an empty sequence; returns whether it could. One that is damaged is removed.
    pub(super) fn restore(&mut self, session: &Session, context: &mut Context<'_>, place: SeqId) -> bool {
        let checked = checksum(&session.state).and_then(|(bytes, xxh3)| match (bytes, xxh3) {
            intact if intact == (session.bytes, session.xxh3) => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it does not have its checksum")),
        });
        if let Err(error) = checked {
            // Another process, or another model on this file, may have removed it.
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(session = %session.state.display(), %error, "a damaged session is ignored");
            }
            self.forget(session);
            return false;
        }
        // Its age decides who leaves when the store is full. If it cannot be noted, it leaves earlier.
        let _aged = File::options()
            .append(true)
            .open(&session.state)
            .and_then(|file| file.set_modified(SystemTime::now()));
        let restored = context.restore(place, &session.tokens, &session.state);
        if let Err(error) = &restored {
            tracing::warn!(session = %session.state.display(), %error, "a session could not be restored");
            self.forget(session);
        }
        restored.is_ok()
    }

    /// Writes a sequence, unless it is short or there already. What it goes on from is not needed any more.
    pub(super) fn store(&mut self, context: &Context<'_>, place: SeqId, tokens: &[LlamaToken]) {
        self.forget_removed();
        let there =
            |session: &Session| session.tokens == tokens || !self.whole && session.tokens.starts_with(tokens);
        if tokens.len() < LEAST_TOKENS || self.known.iter().any(there) {
            return;
        }
        match self.write(context, place, tokens) {
            Ok(session) => {
                let begins = |other: &Session| !self.whole && tokens.starts_with(&other.tokens);
                for superfluous in self.known.extract_if(.., |other| begins(other)) {
                    remove(&superfluous.state);
                }
                self.known.push(session);
            }
            Err(error) => {
                tracing::warn!(folder = %self.store.folder.display(), %error, "a session could not be written");
            }
        }
    }

    fn write(&self, context: &Context<'_>, place: SeqId, tokens: &[LlamaToken]) -> Result<Session, Error> {
        let failed = |source| Error::WriteSession { folder: self.store.folder.clone(), source };
        make_private(&self.store.folder).map_err(failed)?;
        let state = self.store.folder.join(format!("{}.kv", self.name(tokens)));
        if !self.store.make_room(Bytes(context.saved_bytes(place))) {
            let larger =
                io::Error::new(io::ErrorKind::StorageFull, "it is larger than the whole store may be");
            return Err(failed(larger));
        }
        let written = Unfinished::new(&state);
        context.save(place, tokens, &written.path)?;
        let (bytes, xxh3) = checksum(&written.path).map_err(failed)?;
        let description = Description {
            owner: self.owner.clone(),
            tokens: tokens.iter().map(|token| token.0).collect(),
            bytes,
            xxh3,
        };
        let text = serde_json::to_vec(&description).map_err(|error| failed(error.into()))?;
        let described = Unfinished::new(&state.with_extension("json"));
        fs::write(&described.path, text).map_err(failed)?;
        written.finish().map_err(failed)?;
        described.finish().map_err(failed)?;
        Ok(Session { state, tokens: tokens.to_vec(), bytes, xxh3 })
    }

    /// The same for the same tokens of the same model.
    fn name(&self, tokens: &[LlamaToken]) -> String {
        let ids: Vec<u8> = tokens.iter().flat_map(|token| token.0.to_le_bytes()).collect();
        let owner = format!("{:?}", self.owner);
        format!("{:016x}-{:016x}", xxh3_64(owner.as_bytes()), xxh3_64(&ids))
    }

    /// Whoever makes room in the store, another process too, removes what is oldest there.
    fn forget_removed(&mut self) {
        self.known.retain(|session| session.state.exists());
    }

    fn forget(&mut self, session: &Session) {
        self.known.retain(|other| other != session);
        remove(&session.state);
    }
}

/// What an adapter is, besides its name: its scale, size and age.
fn adapter(path: &Path, scale: f32) -> String {
    let file = fs::metadata(path).ok();
    let modified = file.as_ref().and_then(|file| file.modified().ok());
    format!("{scale} {:?} {modified:?}", file.map(|file| file.len()))
}

/// A file under another name, which is removed unless it is finished.
struct Unfinished {
    path: PathBuf,
    name: PathBuf,
    finished: bool,
}

impl Unfinished {
    fn new(name: &Path) -> Self {
        let mut path = name.as_os_str().to_owned();
        path.push(format!(".{}.part", std::process::id()));
        Self { path: path.into(), name: name.to_owned(), finished: false }
    }

    fn finish(mut self) -> io::Result<()> {
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

/// Removes a session. A file that is gone already is as good.
fn remove(state: &Path) {
    for path in [state.with_extension("json"), state.to_owned()] {
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(session = %path.display(), %error, "a session could not be removed");
        }
    }
}

/// Conversations are nobody else's business.
fn make_private(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

fn has_end(path: &Path, end: &str) -> bool {
    path.extension().is_some_and(|extension| extension == end)
}

/// A file's length and checksum.
fn checksum(path: &Path) -> io::Result<(u64, u64)> {
    let mut file = File::open(path)?;
    let mut hash = Xxh3::new();
    let mut piece = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut piece)? {
            0 => return Ok((bytes, hash.digest())),
            length => {
                hash.update(&piece[..length]);
                bytes += length as u64;
            }
        }
    }
}

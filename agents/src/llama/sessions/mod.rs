//! The session store: what was computed of conversations, on disk, for when their model is loaded again.
//!
//! A session is two files. `<name>.kv` holds a sequence as llama.cpp writes it; `<name>.json` says of which model and
//! settings, which tokens, and the other file's length and checksum. The second one is written last, under another name,
//! and renamed: a session without it does not exist. Nothing that does not fit its description is given to llama.cpp.

mod store;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

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
pub use store::SessionStore;
use store::{Unfinished, remove};

/// Of this form of session, and of the state that this llama.cpp writes.
const VERSION: &str = concat!("3/", "llama-cpp-sys-2 0.1.161");
/// Shorter conversations are computed again as quickly.
const LEAST_TOKENS: usize = 32;
/// What a description takes, at the most: without its tokens, and for each of them.
const DESCRIPTION_BYTES: u64 = 8 << 10;
const TOKEN_BYTES: u64 = 12;

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

    fn description(&self) -> PathBuf {
        self.state.with_extension("json")
    }
}

/// The sessions of one model with its settings.
#[derive(Debug)]
pub(super) struct Sessions {
    store: Arc<SessionStore>,
    owner: Owner,
    known: Vec<Session>,
    /// The descriptions that were read, other models' too.
    read: BTreeSet<PathBuf>,
    whole: bool,
}

impl Sessions {
    /// Looks for a model's sessions. `whole` says that its states cannot be cut.
    pub(super) fn open(settings: &GgufSettings, header: &Header, n_ctx: u32, whole: bool) -> Option<Self> {
        let store = settings.sessions.clone().filter(|store| !store.keeps_none())?;
        store.tidy_up();
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
        let mut sessions = Self { store, owner, known: Vec::new(), read: BTreeSet::new(), whole };
        sessions.look();
        Some(sessions)
    }

    /// Sees what has come and gone: whoever makes room in the store removes what is oldest there, and another engine on the
    /// same file, of another process too, writes its own.
    fn look(&mut self) {
        let there = self.store.descriptions();
        self.known.retain(|session| there.contains(&session.description()));
        self.read.retain(|path| there.contains(path));
        for path in there {
            if !self.read.contains(&path) {
                self.known.extend(self.read(&path));
                self.read.insert(path);
            }
        }
    }

    /// A session by its description; none where that is another model's, or no description: such a one is removed.
    fn read(&self, path: &Path) -> Option<Session> {
        let state = path.with_extension("kv");
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) => {
                // Removed since it was seen, mostly.
                tracing::debug!(session = %path.display(), %error, "a session cannot be read");
                return None;
            }
        };
        let description: Description = match serde_json::from_slice(&text) {
            Ok(description) => description,
            Err(error) => {
                tracing::warn!(session = %path.display(), %error, "a damaged session is removed");
                remove(&state);
                return None;
            }
        };
        if description.owner != self.owner {
            return None;
        }
        let Description { tokens, bytes, xxh3, .. } = description;
        let tokens = tokens.into_iter().map(LlamaToken).collect();
        Some(Session { state, tokens, bytes, xxh3 })
    }

    /// The session that helps most with a prompt and fits a context of `n_ctx`, and how many tokens it saves.
    pub(super) fn best(&mut self, prompt: &[LlamaToken], n_ctx: usize) -> Option<(Session, usize)> {
        self.look();
        let help = |session: &Session| reusable(&session.tokens, prompt, self.whole);
        let fitting = self.known.iter().filter(|session| session.tokens.len() < n_ctx);
        let (session, length) =
            fitting.map(|session| (session, help(session))).max_by_key(|(_, length)| *length)?;
        (length > 0).then(|| (session.clone(), length))
    }

    /// Puts a session into an empty sequence; returns whether it could. One that is damaged is removed.
    pub(super) fn restore(&mut self, session: &Session, context: &mut Context<'_>, place: SeqId) -> bool {
        // Another engine may have written the same conversation again since.
        let now = self.read(&session.description()).filter(|now| now.tokens == session.tokens);
        let Some(session) = &now else {
            self.known.retain(|known| known.state != session.state);
            return false;
        };
        let checked = checksum(&session.state).and_then(|(bytes, xxh3)| match (bytes, xxh3) {
            intact if intact == (session.bytes, session.xxh3) => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it does not have its checksum")),
        });
        if let Err(error) = checked {
            // Another process, or another model on this file, may have removed it.
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(session = %session.state.display(), %error, "a damaged session is removed");
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
        self.look();
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
                self.read.insert(session.description());
                self.known.retain(|known| known.state != session.state);
                self.known.push(session);
                // Others may have written meanwhile.
                self.store.tidy_up();
            }
            Err(error) => {
                tracing::warn!(folder = %self.store.folder().display(), %error, "a session could not be written");
            }
        }
    }

    fn write(&self, context: &Context<'_>, place: SeqId, tokens: &[LlamaToken]) -> Result<Session, Error> {
        let failed = |source| Error::WriteSession { folder: self.store.folder().to_owned(), source };
        make_private(self.store.folder()).map_err(failed)?;
        let state = self.store.folder().join(format!("{}.kv", self.name(tokens)));
        let bytes = context.saved_bytes(place) + DESCRIPTION_BYTES + tokens.len() as u64 * TOKEN_BYTES;
        let full =
            || io::Error::new(io::ErrorKind::StorageFull, "it is larger than what the store has room for");
        let _room = self.store.room(Bytes(bytes)).ok_or_else(full).map_err(failed)?;
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

    fn forget(&mut self, session: &Session) {
        self.known.retain(|known| known.state != session.state);
        remove(&session.state);
    }
}

/// What an adapter is, besides its name: its scale, size and age.
fn adapter(path: &Path, scale: f32) -> String {
    let file = fs::metadata(path).ok();
    let modified = file.as_ref().and_then(|file| file.modified().ok());
    format!("{scale} {:?} {modified:?}", file.map(|file| file.len()))
}

/// Conversations are nobody else's business.
fn make_private(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
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

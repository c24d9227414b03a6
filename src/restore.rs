//! The set of models that was loaded when the program ended, to be loaded again at its next start.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sarai_core::config::{Class, Config};
use sarai_core::pool::ModelPool;
use sarai_core::scheduler::Phase;
use serde::{Deserialize, Serialize};

/// Where it is written, one file for each set of configured models.
#[derive(Debug)]
pub(crate) struct Restore {
    path: PathBuf,
    /// Whether this pool has begun where the last one ended. One that has not, such as that of a single command, leaves what was
    /// written as it is.
    took_over: AtomicBool,
}

/// What is written. Another version is no error: it is not read.
#[derive(Debug, Serialize, Deserialize)]
struct Loaded {
    version: u32,
    /// Most valuable first.
    models: Vec<String>,
}

const VERSION: u32 = 1;

impl Restore {
    /// `None` without a folder of the user's.
    pub(crate) fn of(config: &Config, folder: Option<&Path>) -> Option<Self> {
        // Whoever has the same models is taken for the same agent.
        let mut hasher = DefaultHasher::new();
        let files: BTreeMap<_, _> = config
            .models
            .iter()
            .map(|(name, model)| (name.as_str(), format!("{:?}", model.places)))
            .collect();
        files.hash(&mut hasher);
        let path = folder?.join(format!("loaded-{:016x}.json", hasher.finish()));
        Some(Self { path, took_over: AtomicBool::new(false) })
    }

    /// Writes down what is loaded, by class, then the most recently used first. Residents are loaded at each start anyway.
    pub(crate) async fn save(&self, pool: &ModelPool) {
        if !self.took_over.load(Ordering::Relaxed) {
            return;
        }
        let Ok(status) = pool.status().await else { return };
        let ready = |phase| matches!(phase, Phase::Ready | Phase::Resizing);
        let mut slots: Vec<_> = status
            .slots
            .iter()
            .filter(|slot| ready(slot.phase) && slot.class != Class::Resident && slot.reserved.0 > 0)
            .collect();
        slots.sort_by_key(|slot| (std::cmp::Reverse(slot.class), slot.idle.unwrap_or(Duration::ZERO)));
        let mut models: Vec<String> = slots.iter().map(|slot| slot.model.to_string()).collect();
        models.dedup();
        if let Err(error) = write(&self.path, &Loaded { version: VERSION, models }) {
            tracing::warn!(path = %self.path.display(), %error, "what was loaded cannot be written down");
        }
    }

    /// Loads what was written down, one after another, as long as there is room. A model that is not configured any more, and a
    /// file that cannot be read, are passed over with a word in the log.
    pub(crate) async fn load(&self, pool: &ModelPool) {
        self.took_over.store(true, Ordering::Relaxed);
        let loaded = match read(&self.path) {
            Ok(Some(loaded)) => loaded,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "what was loaded before cannot be read");
                return;
            }
        };
        for model in loaded.models {
            // Room is looked for before each: what was loaded before it has taken some.
            let fits = match pool.plan(&[&model]).await {
                Ok(plans) => plans.iter().any(|plan| {
                    let local = plan.estimate.as_ref().is_some_and(|estimate| estimate.total().0 > 0);
                    local && plan.fits && plan.evict.is_empty() && plan.shorten.is_empty()
                }),
                Err(error) => {
                    tracing::info!(model, %error, "not restored");
                    continue;
                }
            };
            if !fits {
                tracing::info!(model, "not restored: there is no room for it");
                continue;
            }
            match pool.load_local(&model).await {
                Ok(()) => tracing::info!(model, "restored"),
                Err(error) => tracing::warn!(model, %error, "not restored"),
            }
        }
    }
}

fn read(path: &Path) -> io::Result<Option<Loaded>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let loaded: Loaded = serde_json::from_slice(&text)?;
    Ok((loaded.version == VERSION).then_some(loaded))
}

/// Complete or as before.
fn write(path: &Path, loaded: &Loaded) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec(loaded)?)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

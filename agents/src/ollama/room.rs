//! Keeps what a host holds below its limit: now and then, and before each load that is asked of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sarai_core::units::Bytes;

use super::client::{Client, with_tag};
use super::memory::{Advice, Seen};
use crate::Error;
use crate::error::Stage;

/// How long is waited until a model that was never seen before is looked at again.
const SECOND_LOOK: Duration = Duration::from_millis(300);
/// Looks and unloads for one load.
const MOST_ROUNDS: usize = 32;
/// Of a model that was never seen in memory, the file's size is known; keys, values and buffers come on top.
const BESIDE_THE_FILE: f64 = 1.15;

/// What a host may hold, and what is known of what it does.
#[derive(Debug)]
pub(super) struct Room {
    limit: Option<Bytes>,
    /// Held by whoever makes room, so that two loads do not take the same.
    state: tokio::sync::Mutex<State>,
    coming: ComingModels,
    /// Names as the host lists them: these are never unloaded.
    kept: Mutex<BTreeSet<String>>,
    /// Requests of this process that run, by the name that they asked for.
    running: Arc<Mutex<BTreeMap<String, usize>>>,
}

#[derive(Debug, Default)]
struct State {
    seen: Seen,
    /// What each model took when it was last seen.
    sizes: BTreeMap<String, Bytes>,
}

/// Models that a host was asked to load and does not list yet: what each will take, and how many requests wait for it.
type ComingModels = Arc<Mutex<BTreeMap<String, (Bytes, usize)>>>;

/// A request's part in that. Taken back when it has its answer, or is given up.
#[derive(Debug)]
pub(super) struct Coming {
    name: String,
    coming: ComingModels,
}

impl Drop for Coming {
    fn drop(&mut self) {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, requests)) = coming.get_mut(&self.name) {
            *requests -= 1;
            if *requests == 0 {
                coming.remove(&self.name);
            }
        }
    }
}

/// A request that runs; a model is not unloaded meanwhile.
#[derive(Debug)]
pub(super) struct Running {
    name: String,
    running: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = running.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.name);
            }
        }
    }
}

impl Room {
    pub(super) fn new(limit: Option<Bytes>) -> Self {
        Self {
            limit,
            state: Default::default(),
            coming: Arc::default(),
            kept: Mutex::default(),
            running: Arc::default(),
        }
    }

    pub(super) fn limit(&self) -> Option<Bytes> {
        self.limit
    }

    pub(super) fn keep(&self, models: impl IntoIterator<Item = String>) {
        let names = models.into_iter().map(|model| with_tag(&model)).collect();
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = names;
    }

    pub(super) fn running(&self, model: &str) -> Running {
        let name = with_tag(model);
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        *running.entry(name.clone()).or_default() += 1;
        Running { name, running: Arc::clone(&self.running) }
    }

    /// Makes room for a load that is about to be asked for, where the host does not hold the model and nobody has asked for it.
    pub(super) async fn before_load(&self, client: &Client, model: &str) -> Result<Option<Coming>, Error> {
        let (Some(limit), name) = (self.limit, with_tag(model)) else { return Ok(None) };
        let mut state = self.state.lock().await;
        state.look(client).await?;
        if state.seen.holds(&name) {
            return Ok(None);
        }
        if let Some((_, requests)) = self.coming().get_mut(&name) {
            *requests += 1;
            return Ok(Some(Coming { name, coming: Arc::clone(&self.coming) }));
        }
        let size = match state.sizes.get(&name) {
            Some(size) => *size,
            None => client
                .size_on_disk(&name)
                .await?
                .map_or(Bytes::ZERO, |file| Bytes((file.0 as f64 * BESIDE_THE_FILE) as u64)),
        };
        self.make(client, &mut state, limit, size).await?;
        self.coming().insert(name.clone(), (size, 1));
        Ok(Some(Coming { name, coming: Arc::clone(&self.coming) }))
    }

    fn coming(&self) -> MutexGuard<'_, BTreeMap<String, (Bytes, usize)>> {
        // Nothing panics while it is held.
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the host, and has it unload models until it is below its limit. Returns what it holds then.
    pub(super) async fn tidy(&self, client: &Client) -> Result<Bytes, Error> {
        let mut state = self.state.lock().await;
        state.look(client).await?;
        if let Some(limit) = self.limit {
            self.make(client, &mut state, limit, Bytes::ZERO).await?;
        }
        Ok(state.seen.held())
    }

    async fn make(&self, client: &Client, state: &mut State, limit: Bytes, size: Bytes) -> Result<(), Error> {
        // Models whose unload did not come about: the next one is tried.
        let mut stuck = BTreeSet::new();
        for _ in 0..MOST_ROUNDS {
            // What has come meanwhile is counted among what is held.
            let coming = self
                .coming()
                .iter()
                .filter(|(name, _)| !state.seen.holds(name))
                .map(|(_, (size, _))| *size)
                .sum();
            let more = size + coming;
            let kept = {
                let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(running.keys().chain(&stuck).cloned());
                kept
            };
            match state.seen.advice(limit, more, &kept) {
                Advice::Fits => return Ok(()),
                Advice::Unload(model) => {
                    let held = state.seen.held();
                    tracing::info!(host = %client.host(), model, %held, %more, %limit, "the host unloads a model");
                    match client.unload(&model).await {
                        Err(Error::Deadline { stage: Stage::Unload, .. }) => {
                            stuck.insert(model);
                        }
                        unloaded => unloaded?,
                    }
                }
                Advice::LookAgain => tokio::time::sleep(SECOND_LOOK).await,
                Advice::Full => return Err(full(client, state, more, limit)),
            }
            state.look(client).await?;
        }
        // Somebody loads faster than this unloads.
        Err(full(client, state, size, limit))
    }
}

fn full(client: &Client, state: &State, more: Bytes, limit: Bytes) -> Error {
    Error::HostFull { host: client.host().clone(), held: state.seen.held(), more, limit }
}

impl State {
    async fn look(&mut self, client: &Client) -> Result<(), Error> {
        let listed = client.ps().await?;
        self.seen.look(&listed);
        for model in listed {
            self.sizes.insert(model.name, Bytes(model.size));
        }
        Ok(())
    }
}

//! Keeps the memory of Ollama hosts in order, as the configuration says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use sarai_agents::ollama::{Client, HostWatch, Watcher};
use sarai_core::config::{Config, ModelConfig, OnHost, Place};
use sarai_core::pool::ModelPool;
use sarai_core::units::{Bytes, HostName, ModelName};

/// One watch for each host that is to be watched.
pub(crate) fn watches(
    config: &Config,
    clients: &BTreeMap<HostName, Arc<Client>>,
    pool: &ModelPool,
) -> Vec<HostWatch> {
    let watched = clients.iter().filter_map(|(name, client)| {
        let interval = config.hosts.get(name)?.watch_interval?;
        let watcher = HostInPool {
            pool: pool.clone(),
            host: name.clone(),
            models: names_on(config, name),
            here: client.is_here(),
        };
        Some(HostWatch::start(Arc::clone(client), interval, Arc::new(watcher)))
    });
    watched.collect()
}

/// What the models that run on a host are called there.
fn names_on(config: &Config, host: &HostName) -> Vec<(ModelName, String)> {
    let on = |model: &ModelConfig| -> Vec<String> {
        let hosts = model.places.iter().filter_map(|place| match place {
            Place::Hosts { hosts, .. } => Some(hosts),
            Place::Gguf(_) | Place::Model(_) => None,
        });
        hosts.flatten().filter(|on: &&OnHost| on.host == *host).map(|on| on.model.clone()).collect()
    };
    let models = config.models.iter();
    models.flat_map(|(name, model)| on(model).into_iter().map(move |there| (name.clone(), there))).collect()
}

/// A host as the pool sees it.
struct HostInPool {
    pool: ModelPool,
    host: HostName,
    models: Vec<(ModelName, String)>,
    here: bool,
}

#[async_trait]
impl Watcher for HostInPool {
    /// What is pinned here stays loaded there.
    async fn keeps(&self) -> Vec<String> {
        let Ok(status) = self.pool.status().await else { return Vec::new() };
        let pinned: BTreeSet<&ModelName> =
            status.slots.iter().filter(|slot| slot.pinned).map(|slot| &slot.model).collect();
        let kept = self.models.iter().filter(|(model, _)| pinned.contains(model));
        kept.map(|(_, there)| there.clone()).collect()
    }

    async fn holds(&self, bytes: Bytes) {
        if !self.here {
            return;
        }
        if let Err(error) = self.pool.set_outside(self.host.as_str(), bytes).await {
            tracing::debug!(host = %self.host, %error, "nobody counts what the host holds any more");
        }
    }
}

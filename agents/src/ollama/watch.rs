use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sarai_core::units::Bytes;
use tokio::task::JoinHandle;

use super::client::Client;
use crate::Error;

/// Who watches a host: says what it wants kept, and hears what the host holds.
#[async_trait]
pub trait Watcher: Send + Sync + 'static {
    /// Models, by their names on the host, that are not to be unloaded.
    async fn keeps(&self) -> Vec<String>;

    /// The host holds so much, or, where it cannot be reached, nothing that is known of.
    async fn holds(&self, bytes: Bytes);
}

/// Looks at a host now and then and keeps it below its limit, until this is dropped. It only ever asks for what is loaded,
/// and has models unloaded; no file is touched.
#[derive(Debug)]
pub struct HostWatch {
    task: JoinHandle<()>,
}

impl HostWatch {
    /// Begins to watch, within a tokio runtime.
    #[must_use]
    pub fn start(client: Arc<Client>, interval: Duration, watcher: Arc<dyn Watcher>) -> Self {
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut said = false;
            loop {
                ticks.tick().await;
                client.keep(watcher.keeps().await);
                let tidied = client.tidy().await;
                if let Some(held) = held(&client, &tidied, &mut said) {
                    watcher.holds(held).await;
                }
            }
        });
        Self { task }
    }
}

/// What a host holds after it was looked at; `None` where that is as before, for all that is known. What is wrong is said once,
/// until it is right again.
fn held(client: &Client, tidied: &Result<Bytes, Error>, said: &mut bool) -> Option<Bytes> {
    let (held, wrong) = match tidied {
        Ok(held) => (Some(*held), None),
        Err(error @ Error::HostFull { held, .. }) => (Some(*held), Some(error)),
        // Nobody is there.
        Err(error @ Error::Connect { .. }) => (Some(Bytes::ZERO), Some(error)),
        Err(error) => (None, Some(error)),
    };
    let before = std::mem::replace(said, wrong.is_some());
    if let Some(error) = wrong.filter(|_| !before) {
        tracing::warn!(host = %client.host(), %error, "the host's memory cannot be kept in order");
    }
    held
}

impl Drop for HostWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use directories::ProjectDirs;
use metrics_exporter_prometheus::PrometheusBuilder;
use sarai::core::config::{self, Config, Env, Overrides, Resolved};
use sarai::{Error, Sarai, env};

use super::args::Common;
use super::exit::Failure;
use super::output::Output;
use super::progress;

/// How long requests in progress may take to end when a command is done.
const GRACE: Duration = Duration::from_secs(5);

/// What the command that runs has open, for when it is interrupted.
static OPEN: Mutex<Option<Sarai>> = Mutex::new(None);

/// A command's configuration and pool.
pub(super) struct Session {
    pub(super) sarai: Sarai,
    pub(super) config: Config,
}

impl Session {
    /// Reads the configuration and starts its pool, with progress of loads where someone is watching.
    pub(super) fn open(common: &Common, output: &Output) -> Result<Self, Failure> {
        let path = find(common.config.as_deref())?;
        Self::start(read(common, &path)?, output)
    }

    /// The same for commands that may run long enough to be watched: they serve metrics where that is configured.
    pub(super) fn open_with_metrics(common: &Common, output: &Output) -> Result<Self, Failure> {
        let path = find(common.config.as_deref())?;
        let resolved = read(common, &path)?;
        // Before the pool, which registers its metrics at its start.
        serve_metrics(&resolved.config, output);
        let session = Self::start(resolved, output)?;
        session.sarai.watch_hosts(&session.config);
        Ok(session)
    }

    pub(super) fn start(resolved: Resolved, output: &Output) -> Result<Self, Failure> {
        for warning in &resolved.warnings {
            output.warn(&warning.to_string());
        }
        let sarai = Sarai::start(&resolved.config)?;
        *open() = Some(sarai.clone());
        if output.is_watched() {
            progress::show(sarai.pool());
        }
        Ok(Self { sarai, config: resolved.config })
    }

    /// Gives all memory back.
    pub(super) async fn close(self) {
        self.sarai.shutdown(GRACE).await;
        open().take();
    }
}

/// Closes what an interrupted command has left open. Its requests are given up already.
pub(super) async fn close_open() {
    let sarai = open().clone();
    if let Some(sarai) = sarai {
        sarai.shutdown(GRACE).await;
    }
}

fn open() -> MutexGuard<'static, Option<Sarai>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file that was named, or the first default that is there.
pub(super) fn find(named: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let user = ProjectDirs::from("", "", "sarai").map(|dirs| dirs.config_dir().join("sarai.yaml"));
    let tried: Vec<PathBuf> = [PathBuf::from("config/sarai.yaml")].into_iter().chain(user).collect();
    tried.iter().find(|path| path.exists()).cloned().ok_or(Failure::NoConfiguration { tried })
}

/// Reads and checks a configuration with the environment, `.env` and the flags.
pub(super) fn read(common: &Common, path: &Path) -> Result<Resolved, Failure> {
    let env = env::read(".env".as_ref()).map_err(Error::from)?;
    Ok(config::load(path, &env, &overrides(common)).map_err(Error::from)?)
}

/// Reads a configuration that the program has made for itself: the flags change it, and nothing else does.
pub(super) fn read_made(common: &Common, path: &Path) -> Result<Resolved, Failure> {
    Ok(config::load(path, &Env::default(), &overrides(common)).map_err(Error::from)?)
}

fn overrides(common: &Common) -> Overrides {
    Overrides { max_ram_gb: common.max_ram_gb, max_concurrent_llms: common.max_concurrent_llms }
}

/// Starts the Prometheus endpoint, where one is configured. Another command may have its address already: no reason not
/// to work.
fn serve_metrics(config: &Config, output: &Output) {
    let Some(metrics) = &config.metrics else { return };
    if let Err(error) = PrometheusBuilder::new().with_http_listener(metrics.listen).install() {
        output.warn(&format!("metrics are not served on {}: {error}", metrics.listen));
    }
}

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sarai_agents::llama::{GgufBackend, GgufSettings, SessionStore};
use sarai_agents::ollama::{self, HostWatch};
use sarai_agents::openai;
use sarai_agents::remote::{HostApi, RemoteBackend};
use sarai_core::Error;
use sarai_core::answer::{AnswerStream, CallOptions};
use sarai_core::backend::Backend;
use sarai_core::config::{
    self, Class, Config, ConfigError, HostConfig, HostKind, ModelConfig, OnHost, Overrides, Place, Problem,
    SessionsConfig,
};
use sarai_core::memory::{Probe, SharedBudget, SystemProbe};
use sarai_core::pipeline::{Input, Pipeline, PipelineStream};
use sarai_core::pool::{ModelPool, ModelSpec, PlaceSpec};
use sarai_core::router::{Hints, Router, Routing};
use sarai_core::scheduler::Limits;
use sarai_core::tone::Tones;
use sarai_core::units::{HostName, PipelineName};

use crate::env;
use crate::host_memory::watches;
use crate::restore::Restore;

/// A configuration come to life: the pool over its models and hosts, its router, its pipelines. A cheap clone.
#[derive(Clone, Debug)]
pub struct Sarai {
    pool: ModelPool,
    router: Option<Arc<Router>>,
    pipelines: Arc<BTreeMap<PipelineName, Arc<Pipeline>>>,
    tones: Arc<Tones>,
    hints: Arc<OnceLock<Hints>>,
    hosts: Arc<Hosts>,
    restore: Option<Arc<Restore>>,
}

/// The hosts of a configuration, and who keeps their memory in order.
#[derive(Debug, Default)]
struct Hosts {
    all: BTreeMap<HostName, Arc<dyn HostApi>>,
    ollamas: BTreeMap<HostName, Arc<ollama::Client>>,
    /// Ended with the last clone of what they belong to.
    watches: OnceLock<Vec<HostWatch>>,
}

impl Sarai {
    /// Reads a configuration with the process's environment and the `.env` of the working directory, starts its pool,
    /// and loads the resident models.
    ///
    /// # Errors
    /// The configuration has problems: all of them. A resident model cannot be loaded.
    ///
    /// # Cancel safety
    /// Cancel safe: loads that have begun are given up.
    pub async fn from_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let env = env::read(".env".as_ref())?;
        let resolved = config::load(path.as_ref(), &env, &Overrides::default())?;
        for warning in &resolved.warnings {
            tracing::warn!(%warning, "configuration");
        }
        let sarai = Self::start(&resolved.config)?;
        for (_, loaded) in sarai.pool.load_residents().await {
            loaded?;
        }
        sarai.watch_hosts(&resolved.config);
        sarai.restore().await;
        Ok(sarai)
    }

    /// Starts the pool of a configuration that was read before. Nothing is loaded yet: see
    /// [`ModelPool::load_residents`].
    ///
    /// # Errors
    /// A host's address cannot be used, the models do not go together, or there is no tokio runtime around.
    pub fn start(config: &Config) -> Result<Self, Error> {
        Self::start_in(config, cache_folder().as_deref())
    }

    /// The same, with this folder in place of the user's cache for what is measured and kept of loads and conversations; `None`
    /// keeps nothing but conversations that have a folder of their own.
    ///
    /// # Errors
    /// As for [`Sarai::start`].
    pub fn start_in(config: &Config, cache: Option<&Path>) -> Result<Self, Error> {
        let hosts = Hosts::new(&config.hosts)?;
        let probe = SystemProbe::new();
        let limits = Limits {
            budget: config.memory.budget.bytes(probe.read().map(|memory| memory.total)),
            eviction: config.memory.eviction,
            max_concurrent_llms: config.memory.max_concurrent_llms,
            max_waiting: config.queue.max_waiting,
            ..Limits::default()
        }
        .with_spare();
        let local =
            Local { sessions: session_store(&config.sessions, cache), cache: cache.map(Path::to_owned) };
        let mut builder = ModelPool::builder(limits)
            .probe(Arc::new(probe))
            .wait_timeout(config.queue.wait_timeout)
            .monitor_interval(config.memory.monitor_interval);
        if config.memory.shared {
            builder = builder.share_budget(share()?);
        }
        for (name, model) in &config.models {
            builder = builder.model(ModelSpec {
                name: name.clone(),
                role: model.role,
                class: model.class,
                ttl: model.ttl,
                on_stream_failure: model.on_stream_failure,
                hedge_after: model.hedge_after,
                places: model.places.iter().filter_map(|place| wire(place, model, &hosts, &local)).collect(),
            });
        }
        let pipelines = config
            .pipelines
            .iter()
            .map(|(name, pipeline)| {
                let compiled = Pipeline::compile(name.clone(), pipeline, &config.tones)
                    .map_err(|problems| bad_templates(name, problems))?;
                Ok((name.clone(), Arc::new(compiled)))
            })
            .collect::<Result<_, Error>>()?;
        let restore = config.memory.restore.then(|| Restore::of(config, cache)).flatten();
        Ok(Self {
            pool: builder.build()?,
            restore: restore.map(Arc::new),
            router: config.router.clone().map(|router| Arc::new(Router::new(router))),
            pipelines: Arc::new(pipelines),
            tones: Arc::new(config.tones.clone()),
            hints: Arc::default(),
            hosts: Arc::new(hosts),
        })
    }

    /// The models.
    #[must_use]
    pub fn pool(&self) -> &ModelPool {
        &self.pool
    }

    /// The router, where one is configured.
    #[must_use]
    pub fn router(&self) -> Option<&Arc<Router>> {
        self.router.as_ref()
    }

    /// Asks the router which model should answer a text, and why.
    ///
    /// # Errors
    /// No router is configured, or its model cannot be asked.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn route(&self, text: &str, options: CallOptions) -> Result<Routing, Error> {
        let none =
            || Error::NoRoute { message: "the configuration has no model with role: router".to_owned() };
        self.router.as_ref().ok_or_else(none)?.route(text, &self.pool, options).await
    }

    /// What a person has typed or said so far: once that has stayed for a moment, the model that it will probably go to is made
    /// ready, as far as there is room. Nothing is evicted for it that was used within the last minute. Without a router it does
    /// nothing. Returns at once; needs a tokio runtime around it.
    pub fn hint(&self, partial_text: &str) {
        let Some(router) = &self.router else { return };
        let hints = || Hints::new(Arc::clone(router), Arc::new(self.pool.clone()));
        self.hints.get_or_init(hints).hint(partial_text);
    }

    /// The hosts by name.
    #[must_use]
    pub fn hosts(&self) -> &BTreeMap<HostName, Arc<dyn HostApi>> {
        &self.hosts.all
    }

    /// Those of them that are Ollamas, which tell what they hold in memory.
    #[must_use]
    pub fn ollamas(&self) -> &BTreeMap<HostName, Arc<ollama::Client>> {
        &self.hosts.ollamas
    }

    /// Keeps the hosts' memory in order from now on, as the configuration says: looks at what each holds, unloads idle models
    /// above its `max_ram_gb`, and counts what an Ollama on this machine holds into the budget. Ends with the last clone of
    /// this. [`Sarai::from_file`] does it by itself.
    pub fn watch_hosts(&self, config: &Config) {
        self.hosts.watches.get_or_init(|| watches(config, &self.hosts.ollamas, &self.pool));
    }

    /// Loads the models that were loaded at the last shutdown, as far as there is room, the most valuable first. Nothing is
    /// evicted for it. Without `memory.restore` it does nothing.
    ///
    /// # Cancel safety
    /// Cancel safe: loads that have begun are given up.
    pub async fn restore(&self) {
        if let Some(restore) = &self.restore {
            restore.load(&self.pool).await;
        }
    }

    /// Ends the pool in order, as [`ModelPool::shutdown`] does, and with `memory.restore` writes down what was loaded.
    ///
    /// # Cancel safety
    /// Dropping the future does not stop the shutdown.
    pub async fn shutdown(&self, grace: Duration) {
        if let Some(restore) = &self.restore {
            restore.save(&self.pool).await;
        }
        self.pool.shutdown(grace).await;
    }

    /// The tones: the built-in ones, and those of the configuration.
    #[must_use]
    pub fn tones(&self) -> &Tones {
        &self.tones
    }

    /// Says a text again in a tone, in its own language.
    ///
    /// # Errors
    /// No tone has that name, or the model cannot answer.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future, or later the stream, ends the request.
    pub async fn modulate(
        &self,
        model: &str,
        text: &str,
        tone: &str,
        options: CallOptions,
    ) -> Result<AnswerStream, Error> {
        let unknown = || Error::UnknownTone {
            tone: tone.to_owned(),
            known: self.tones.names().map(str::to_owned).collect(),
        };
        let tone = self.tones.get(tone).ok_or_else(unknown)?;
        self.pool.handle(model)?.modulate(text, tone, options).await
    }

    /// The names of the pipelines.
    pub fn pipelines(&self) -> impl Iterator<Item = &PipelineName> {
        self.pipelines.keys()
    }

    /// Runs a pipeline; see [`Pipeline::run`].
    ///
    /// # Errors
    /// No pipeline has that name.
    pub fn run(&self, pipeline: &str, input: &Input, options: CallOptions) -> Result<PipelineStream, Error> {
        let found = pipeline.parse().ok().and_then(|name: PipelineName| self.pipelines.get(&name));
        let found = found.ok_or_else(|| Error::UnknownPipeline {
            pipeline: pipeline.to_owned(),
            nearest: sarai_core::nearest(pipeline, self.pipelines.keys().map(PipelineName::as_str)),
        })?;
        Ok(found.run(input, Arc::new(self.pool.clone()), self.router.clone(), options))
    }
}

/// What models in this process keep on disk, and where.
struct Local {
    cache: Option<PathBuf>,
    sessions: Option<Arc<SessionStore>>,
}

/// A place with what runs it. The configuration has checked that its host is there.
fn wire(place: &Place, model: &ModelConfig, hosts: &Hosts, local: &Local) -> Option<PlaceSpec> {
    let purpose = model.role.capability();
    let backend: Arc<dyn Backend> = match place {
        Place::Model(other) => return Some(PlaceSpec::Model(other.clone())),
        Place::Gguf(file) => Arc::new(GgufBackend::new(GgufSettings {
            path: file.path.clone(),
            purpose,
            context: file.context,
            weights: file.weights,
            kv_cache_type: file.kv_cache_type,
            resident: model.class == Class::Resident,
            measurements: local.cache.clone(),
            threads: file.threads,
            parallel: file.parallel,
            lora: file.lora.clone(),
            mmproj: file.mmproj.clone(),
            projector_ttl: file.projector_ttl,
            sessions: local.sessions.clone(),
        })),
        Place::Hosts { hosts: on, n_ctx, .. } => {
            let client = |on: &OnHost| Some((Arc::clone(hosts.all.get(&on.host)?), on.model.clone()));
            Arc::new(RemoteBackend::new(on.iter().filter_map(client), *n_ctx, purpose))
        }
    };
    Some(PlaceSpec::Backend(backend))
}

impl Hosts {
    fn new(config: &BTreeMap<HostName, HostConfig>) -> Result<Self, Error> {
        let mut hosts = Self::default();
        for (name, host) in config {
            let bad = |error| bad_host(name, &error);
            let client: Arc<dyn HostApi> = match host.kind {
                HostKind::Ollama => {
                    let client = Arc::new(ollama::Client::new(name.clone(), host).map_err(bad)?);
                    hosts.ollamas.insert(name.clone(), Arc::clone(&client));
                    client
                }
                HostKind::Openai => Arc::new(openai::Client::new(name.clone(), host).map_err(bad)?),
            };
            hosts.all.insert(name.clone(), client);
        }
        Ok(hosts)
    }
}

/// Where there is neither a folder of the configuration's nor one of the user's, conversations are not kept.
fn session_store(config: &SessionsConfig, cache: Option<&Path>) -> Option<Arc<SessionStore>> {
    let folder = config.path.clone().or_else(|| Some(cache?.join("sessions")))?;
    Some(SessionStore::new(folder, config.max_bytes))
}

/// This process's part in the budget of all of the user's processes.
fn share() -> Result<SharedBudget, Error> {
    let bad = |message: String| Error::Config(ConfigError::of("memory.shared", message));
    let folder = runtime_folder().ok_or_else(|| bad("there is no home folder to keep it in".to_owned()))?;
    SharedBudget::join(&folder).map_err(|error| bad(format!("{} cannot be used: {error}", folder.display())))
}

/// The user's own, for what concerns processes. What is left of an earlier run there is a dead process's, and removed.
fn runtime_folder() -> Option<PathBuf> {
    let given = directories::BaseDirs::new().and_then(|dirs| dirs.runtime_dir().map(Path::to_owned));
    Some(given.map(|dir| dir.join("sarai")).or_else(cache_folder)?.join("budget-1"))
}

/// The user's own, for what can be made again.
fn cache_folder() -> Option<PathBuf> {
    Some(directories::ProjectDirs::from("", "", "sarai")?.cache_dir().to_owned())
}

fn bad_host(name: &HostName, error: &sarai_agents::Error) -> Error {
    Error::Config(ConfigError::of(format!("hosts.{name}.url"), error.to_string()))
}

fn bad_templates(name: &PipelineName, problems: Vec<sarai_core::pipeline::TemplateProblem>) -> Error {
    let problem = |p: sarai_core::pipeline::TemplateProblem| Problem {
        file: None,
        line: None,
        path: format!("pipelines.{name}.steps[{}].{}", p.step, p.key),
        message: p.message,
    };
    Error::Config(ConfigError { problems: problems.into_iter().map(problem).collect() })
}

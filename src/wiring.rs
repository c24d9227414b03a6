use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sarai_agents::llama::{GgufBackend, GgufSettings};
use sarai_agents::ollama::{Client, OllamaBackend};
use sarai_core::Error;
use sarai_core::answer::CallOptions;
use sarai_core::backend::Backend;
use sarai_core::config::{self, Config, ConfigError, ModelConfig, ModelRole, Overrides, Place, Problem};
use sarai_core::pipeline::{Input, Pipeline, PipelineStream};
use sarai_core::pool::{ModelPool, ModelSpec, PlaceSpec};
use sarai_core::request::Capability;
use sarai_core::router::Router;
use sarai_core::scheduler::Limits;
use sarai_core::units::{HostName, PipelineName};

use crate::env;

/// A configuration come to life: the pool over its models and hosts, its router, its pipelines. A cheap clone.
#[derive(Clone, Debug)]
pub struct Sarai {
    pool: ModelPool,
    router: Option<Arc<Router>>,
    pipelines: Arc<BTreeMap<PipelineName, Arc<Pipeline>>>,
    hosts: Arc<BTreeMap<HostName, Arc<Client>>>,
}

/// A waiting request moves up a class of priority each time this passes.
const AGING: std::time::Duration = std::time::Duration::from_secs(30);
/// A request that has waited this long for room holds back new requests on the models in its way.
const DRAIN_AFTER: std::time::Duration = std::time::Duration::from_secs(10);
/// A model in this process works its requests off one at a time.
const PARALLEL_LOCAL: usize = 1;
/// Helpers are quick: several requests may stand at their thread.
const PARALLEL_HELPER: usize = 8;

impl Sarai {
    /// Reads a configuration with the process's environment and the `.env` of the working directory, and starts its
    /// pool. Nothing is loaded yet; [`ModelPool::load_residents`] does that. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// The configuration has problems: all of them.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let env = env::read(".env".as_ref())?;
        let resolved = config::load(path, &env, &Overrides::default())?;
        for warning in &resolved.warnings {
            tracing::warn!(%warning, "configuration");
        }
        Self::start(&resolved.config)
    }

    /// Starts the pool of a configuration that was read before. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// A host's address cannot be used, or the models do not go together.
    pub fn start(config: &Config) -> Result<Self, Error> {
        let hosts = config
            .hosts
            .iter()
            .map(|(name, host)| {
                Ok((name.clone(), Arc::new(Client::new(name.clone(), host).map_err(|e| bad_host(name, &e))?)))
            })
            .collect::<Result<BTreeMap<_, _>, Error>>()?;
        let limits = Limits {
            budget: config.memory.budget,
            max_concurrent_llms: config.memory.max_concurrent_llms,
            max_waiting: config.queue.max_waiting,
            aging: AGING,
            drain_after: DRAIN_AFTER,
        };
        let mut builder = ModelPool::builder(limits).wait_timeout(config.queue.wait_timeout);
        for (name, model) in &config.models {
            builder = builder.model(ModelSpec {
                name: name.clone(),
                role: model.role,
                class: model.class,
                ttl: model.ttl,
                places: model.places.iter().filter_map(|place| wire(place, model, config, &hosts)).collect(),
            });
        }
        let pipelines = config
            .pipelines
            .iter()
            .map(|(name, pipeline)| {
                let compiled = Pipeline::compile(name.clone(), pipeline)
                    .map_err(|problems| bad_templates(name, problems))?;
                Ok((name.clone(), Arc::new(compiled)))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            pool: builder.build()?,
            router: config.router.clone().map(|router| Arc::new(Router::new(router))),
            pipelines: Arc::new(pipelines),
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

    /// The hosts' clients by name.
    #[must_use]
    pub fn hosts(&self) -> &BTreeMap<HostName, Arc<Client>> {
        &self.hosts
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

/// A place with what runs it. The configuration has checked that its host is there.
fn wire(
    place: &Place,
    model: &ModelConfig,
    config: &Config,
    hosts: &BTreeMap<HostName, Arc<Client>>,
) -> Option<PlaceSpec> {
    let (purpose, helper) = match model.role {
        ModelRole::Llm => (Capability::Generate, false),
        ModelRole::Embedding => (Capability::Embed, true),
        ModelRole::Router => (Capability::Classify, true),
    };
    let (backend, parallel): (Arc<dyn Backend>, usize) = match place {
        Place::Model(other) => return Some(PlaceSpec::Model(other.clone())),
        Place::Gguf(file) => {
            let backend = GgufBackend::new(GgufSettings {
                path: file.path.clone(),
                purpose,
                context: file.context,
                weights: file.weights,
                threads: file.threads,
            });
            (Arc::new(backend), if helper { PARALLEL_HELPER } else { PARALLEL_LOCAL })
        }
        Place::Ollama { host, model, n_ctx } => {
            let client = Arc::clone(hosts.get(host)?);
            let parallel = config.hosts.get(host)?.parallel;
            (Arc::new(OllamaBackend { client, model: model.clone(), n_ctx: *n_ctx, purpose }), parallel)
        }
    };
    Some(PlaceSpec::Backend { backend, parallel })
}

fn bad_host(name: &HostName, error: &sarai_agents::Error) -> Error {
    problem(format!("hosts.{name}.url"), error.to_string())
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

fn problem(path: String, message: String) -> Error {
    Error::Config(ConfigError { problems: vec![Problem { file: None, line: None, path, message }] })
}

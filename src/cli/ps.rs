use std::collections::BTreeMap;

use comfy_table::Table;
use sarai::agents::ollama::HostModel;
use sarai::agents::remote::HostApi;
use sarai::core::backend;
use sarai::core::config::HostKind;
use sarai::core::memory::{Estimate, Footprint};
use sarai::core::pool::{ModelMemory, PlannedModel};
use sarai::core::units::Bytes;
use sarai::{Error, MemoryUsage, Sarai};
use serde::Serialize;
use serde_json::json;

use super::args::{Common, PlanArgs, UnloadArgs};
use super::exit::Failure;
use super::output::Output;
use super::session::Session;
use super::table::table;

/// What `--json` gives: the models of this process, and what each host says of itself.
#[derive(Serialize)]
struct Everything<'a> {
    #[serde(flatten)]
    usage: &'a MemoryUsage,
    hosts: &'a BTreeMap<String, HostState>,
}

#[derive(Serialize)]
struct HostState {
    kind: HostKind,
    reachable: bool,
    error: Option<String>,
    /// What it may hold.
    max_bytes: Option<Bytes>,
    /// What it holds in memory; none where its protocol does not tell.
    models: Vec<HostModel>,
    /// The names of what it has, where its protocol does not tell what is in memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    has: Vec<String>,
    /// How it stands with each model of the configuration that may run there.
    places: Vec<HostPlace>,
}

#[derive(Serialize)]
struct HostPlace {
    model: String,
    #[serde(flatten)]
    state: backend::HostState,
}

pub(super) async fn ps(common: &Common, output: &Output) -> Result<(), Failure> {
    let session = Session::open(common, output)?;
    let (usage, hosts) = (with_estimates(&session.sarai).await?, hosts(&session.sarai).await);
    output.line(&memory_table(&usage).to_string())?;
    output.line(&totals(&usage))?;
    output.text(&hosts_text(&hosts))?;
    output.object(&Everything { usage: &usage, hosts: &hosts })?;
    session.close().await;
    Ok(())
}

pub(super) async fn plan(common: &Common, args: &PlanArgs, output: &Output) -> Result<(), Failure> {
    let session = Session::open(common, output)?;
    let names: Vec<&str> = args.models.iter().map(String::as_str).collect();
    let plans = session.sarai.pool().plan(&names).await?;
    for plan in &plans {
        output.line(&plan_text(plan))?;
    }
    output.object(&plans)?;
    // Refused is what a request would be: the first choice's answer is the plan's.
    let refused = plans.into_iter().filter(|plan| !plan.fallback).find_map(|plan| plan.refuse);
    session.close().await;
    match refused {
        // The object says why already.
        Some(error) if output.json => Err(Failure::Refused(error)),
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

pub(super) async fn unload(common: &Common, args: &UnloadArgs, output: &Output) -> Result<(), Failure> {
    let session = Session::open(common, output)?;
    let freed: Vec<String> = match &args.host {
        Some(name) => {
            let client = host(&session.sarai, name)?;
            let failed = |source| Failure::Host { host: name.clone(), source };
            for model in names_on(&session, &args.model, name) {
                if !client.unload(&model).await.map_err(failed)? {
                    let message =
                        format!("host {name:?} speaks OpenAI's protocol, which cannot unload a model");
                    return Err(Failure::Usage(message));
                }
            }
            vec![client.served_by().to_string()]
        }
        None => {
            let hosts = session.sarai.pool().unload_on_hosts(&args.model).await?;
            hosts.iter().map(ToString::to_string).collect()
        }
    };
    if freed.is_empty() {
        output.line(&format!(
            "{} runs on no host; local models are freed when their process ends",
            args.model
        ))?;
    }
    for place in &freed {
        output.line(&format!("{} is unloaded from {place}", args.model))?;
    }
    output.object(&json!({"model": args.model, "unloaded_from": freed}))?;
    session.close().await;
    Ok(())
}

fn host<'a>(sarai: &'a Sarai, name: &str) -> Result<&'a dyn HostApi, Failure> {
    let known = || sarai.hosts().keys().map(|host| host.as_str());
    let found = sarai.hosts().iter().find(|(host, _)| host.as_str() == name);
    found.map(|(_, client)| &**client).ok_or_else(|| {
        let near = sarai::core::nearest(name, known()).map(|near| format!(", did you mean {near:?}?"));
        Failure::Usage(format!("unknown host {name:?}{}", near.unwrap_or_default()))
    })
}

/// What a model of the configuration is called on a host; another name is taken as it is.
fn names_on(session: &Session, model: &str, host: &str) -> Vec<String> {
    use sarai::core::config::Place;
    let configured = session.config.models.iter().find(|(name, _)| name.as_str() == model);
    let hosts = configured.into_iter().flat_map(|(_, model)| &model.places).filter_map(|place| match place {
        Place::Hosts { hosts, .. } => Some(hosts),
        Place::Gguf(_) | Place::Model(_) => None,
    });
    let names = hosts.flatten().filter(|on| on.host.as_str() == host).map(|on| on.model.clone());
    let names: Vec<String> = names.collect();
    if names.is_empty() { vec![model.to_owned()] } else { names }
}

/// Memory usage, with an estimate also for models that are not loaded but whose file is there.
async fn with_estimates(sarai: &Sarai) -> Result<MemoryUsage, Error> {
    let pool = sarai.pool();
    let mut usage = pool.memory_usage().await?;
    let names: Vec<&str> = pool.models().map(|model| model.as_str()).collect();
    let plans = pool.plan(&names).await?;
    for model in usage.models.iter_mut().filter(|model| model.estimated_bytes.is_none()) {
        let own = plans.iter().find(|plan| plan.model == model.model && plan.served_by == model.served_by);
        model.estimate = own.and_then(|plan| plan.estimate.clone());
        model.estimated_bytes = model.estimate.as_ref().map(Estimate::total);
    }
    Ok(usage)
}

async fn hosts(sarai: &Sarai) -> BTreeMap<String, HostState> {
    let standing = sarai.pool().hosts();
    let states = sarai.hosts().iter().map(|(name, client)| {
        let places = standing.iter().flat_map(|(model, states)| {
            let here = states.iter().filter(|state| state.host == client.served_by());
            here.map(|state| HostPlace { model: model.to_string(), state: state.clone() })
        });
        let places: Vec<HostPlace> = places.collect();
        async move {
            let ollama = sarai.ollamas().get(name);
            let told = match ollama {
                Some(ollama) => ollama.ps().await.map(|models| (models, Vec::new())),
                None => client.has().await.map(|has| (Vec::new(), has)),
            };
            let error = told
                .as_ref()
                .err()
                .map(|error| sarai::core::failure::Failure::new(error.kind(), error.to_string()).to_string());
            let (models, has) = told.unwrap_or_default();
            let state = HostState {
                kind: if ollama.is_some() { HostKind::Ollama } else { HostKind::Openai },
                reachable: error.is_none(),
                error,
                max_bytes: ollama.and_then(|ollama| ollama.limit()),
                models,
                has,
                places,
            };
            (name.to_string(), state)
        }
    });
    futures::future::join_all(states).await.into_iter().collect()
}

/// The models of this process, a line each: what each is estimated to take in all, for its context's keys and values and
/// for its compute buffers; what was measured in all, of its file's pages and of the process's own memory.
pub(super) fn memory_table(usage: &MemoryUsage) -> Table {
    let mut table = table(
        [
            "MODEL",
            "STATE",
            "CLASS",
            "SERVED BY",
            "ESTIMATED",
            "KV",
            "COMPUTE",
            "MEASURED",
            "FILE",
            "OWN",
            "CONTEXT",
            "IDLE",
        ],
        &[4, 5, 6, 7, 8, 9, 10, 11],
    );
    for model in &usage.models {
        table.add_row(row(model));
    }
    table
}

fn row(model: &ModelMemory) -> [String; 12] {
    let bytes = |bytes: Option<Bytes>| bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
    let pinned = if model.pinned { ", pinned" } else { "" };
    [
        model.model.to_string(),
        if model.active > 0 { format!("{}, in use", model.state) } else { model.state.to_owned() },
        format!("{}{pinned}", model.class.as_str()),
        shorten(&model.served_by.to_string()),
        bytes(model.estimated_bytes),
        bytes(model.estimate.as_ref().map(|estimate| estimate.kv)),
        bytes(model.estimate.as_ref().map(|estimate| estimate.compute)),
        bytes(model.measured_bytes),
        bytes(model.measured.map(|measured| measured.file_backed)),
        // What loads took together is shared out by their estimates: said, not measured.
        match model.measured {
            Some(Footprint { anonymous: Some(own), exact: false, .. }) => format!("~{own}"),
            measured => bytes(measured.and_then(|measured| measured.anonymous)),
        },
        model.n_ctx.map_or_else(|| "-".to_owned(), |n_ctx| n_ctx.to_string()),
        model.idle_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.0} s")),
    ]
}

/// A path's last part is what tells files apart.
pub(super) fn shorten(place: &str) -> String {
    match place.rsplit_once('/') {
        Some((before, file)) => format!("{}:{file}", before.split(':').next().unwrap_or("")),
        None => place.to_owned(),
    }
}

/// The ledger in one line.
pub(super) fn totals(usage: &MemoryUsage) -> String {
    let mut text = format!(
        "{} of {} reserved (peak {}), {} left, {} of {} LLMs",
        usage.used_bytes,
        usage.budget_bytes,
        usage.peak_bytes,
        usage.headroom_bytes,
        usage.llms,
        usage.max_concurrent_llms
    );
    if usage.others_bytes > Bytes::ZERO {
        text += &format!("; other processes have {}", usage.others_bytes);
    }
    if usage.limit_bytes + usage.others_bytes < usage.budget_bytes {
        text += &format!("; the machine has memory for {} just now", usage.limit_bytes);
    }
    if let Some(system) = &usage.system {
        text += &format!(
            "\nthis process {}; the machine {} available of {}",
            system.process, system.available, system.total
        );
    }
    text
}

fn hosts_text(hosts: &BTreeMap<String, HostState>) -> String {
    let mut text = String::new();
    for (name, state) in hosts {
        let held: Bytes = state.models.iter().map(|model| Bytes(model.size)).sum();
        let limit = state.max_bytes.map(|limit| format!(" {held} of {limit}")).unwrap_or_default();
        text += &match &state.error {
            Some(error) => format!("\nhost {name}: {error}\n"),
            None if !state.has.is_empty() => format!("\nhost {name}: has {}\n", state.has.join(", ")),
            None if state.models.is_empty() => format!("\nhost {name}:{limit} no model loaded\n"),
            None => format!("\nhost {name}:{limit}\n"),
        };
        for model in &state.models {
            let until = model.expires_at.as_deref().unwrap_or("?");
            text += &format!("  {}  {}  until {until}\n", model.name, Bytes(model.size));
        }
        for HostPlace { model, state } in &state.places {
            let failed = state.failure.as_deref().map(|failure| format!(": {failure}")).unwrap_or_default();
            text += &format!(
                "  for {model}: {} of {} requests, breaker {}{failed}\n",
                state.in_flight,
                state.parallel,
                state.breaker.as_str()
            );
        }
    }
    text
}

/// What a load takes, and whether that is estimated or was measured.
fn size_text(estimate: &Estimate) -> String {
    let bytes = match estimate.measured_before {
        Some(measured) => format!(", {measured} as measured before ({} estimated)", estimate.total()),
        None => format!(", {} estimated", estimate.total()),
    };
    bytes
        + &match estimate.load_time {
            Some(time) => format!(", loads in {:.1} s", time.as_secs_f64()),
            // There is nothing to load for a model on a host.
            None if estimate.reserve() == Bytes::ZERO => String::new(),
            None => ", load time not known yet".to_owned(),
        }
}

fn plan_text(plan: &PlannedModel) -> String {
    let names = |names: &[sarai::core::units::ModelName]| {
        names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    let role = if plan.fallback { " (fallback)" } else { "" };
    let size = plan.estimate.as_ref().map(size_text).unwrap_or_default();
    let verdict = match (&plan.refuse, plan.fits) {
        (Some(error), _) => format!("would be refused: {error}"),
        (None, false) => "would wait for models in use".to_owned(),
        (None, true) if plan.load.is_empty() => "is loaded".to_owned(),
        (None, true) => {
            let evicting = (!plan.evict.is_empty()).then(|| format!("evicting {}", names(&plan.evict)));
            let shortening = (!plan.shorten.is_empty())
                .then(|| format!("shortening the context of {}", names(&plan.shorten)));
            let first: Vec<String> = evicting.into_iter().chain(shortening).collect();
            let time = match plan.freeing_seconds {
                Some(seconds) => format!("{seconds:.1} s"),
                None => "time not known yet".to_owned(),
            };
            match first.is_empty() {
                true => "would be loaded".to_owned(),
                false => format!("would be loaded after {} ({time})", first.join(" and ")),
            }
        }
    };
    format!("{}{role} on {}{size}: {verdict}", plan.model, plan.served_by)
}

//! What is done while memory is watched, and what has to hold. Each returns the checks that failed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use sarai::Error;
use sarai_core::units::Bytes;
use sarai_support::gguf::Shape;
use sarai_support::host::Host;
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use crate::Result;
use crate::checks::{Checks, Tally, tally};
use crate::site::{Place, Site};
use crate::watch::{Watch, computed, resident};

/// Requests in flight at once.
const AT_ONCE: usize = 4;
/// How far the process may be from the ledger.
const TOLERANCE: f64 = 0.05;

/// A place's file as a model of the configuration.
fn model(place: &Place, shape: Shape, copy: usize, more: Value) -> Result<Value> {
    let mut model = json!({"backend": "gguf_native", "path": place.file(shape, copy)?});
    if let (Value::Object(model), Value::Object(more)) = (&mut model, more) {
        model.extend(more);
    }
    Ok(model)
}

/// Ends the pool and checks what holds for every row.
async fn end(site: Site, tally: JoinHandle<Tally>, watch: Watch, before: Bytes) -> Result<Checks> {
    let usage = site.sarai.pool().memory_usage().await?;
    site.sarai.pool().shutdown(Duration::from_secs(60)).await;
    let (budget, peak) = (usage.budget_bytes, usage.peak_bytes);
    drop(site);
    let (tally, watched) = (tally.await?, watch.end()?);
    println!(
        "{} loads, {} evictions, {} contexts shortened, {} lengthened",
        tally.loads, tally.evictions, tally.shortened, tally.lengthened
    );
    println!("{} resident once everything was unloaded", resident()?);
    let most = watched.most.saturating_sub(before);
    let mut checks = Checks::new();
    checks.check(tally.over == Bytes::ZERO, format!("the ledger held at most {peak} of {budget}"));
    checks.check(
        most <= budget,
        format!(
            "at most {most} were resident for models, in {} samples ({before} before the first)",
            watched.samples
        ),
    );
    let ratio = most.0 as f64 / peak.0 as f64;
    checks
        .check((ratio - 1.0).abs() <= TOLERANCE, format!("resident / ledger, each at its most: {ratio:.3}"));
    Ok(checks)
}

pub(crate) async fn random(place: &Place, actions: usize, seed: u64) -> Result<Vec<String>> {
    let models = [
        ("lfm2", model(place, Shape::Lfm2, 0, json!({"class": "preferred"}))?),
        ("lfm2-b", model(place, Shape::Lfm2, 1, json!({"weights": "repack"}))?),
        ("lfm2-c", model(place, Shape::Lfm2, 2, json!({"kv_cache_type": "q8_0"}))?),
        ("llama", model(place, Shape::Llama1b, 0, json!({}))?),
        ("omni", model(place, Shape::Omni7b, 0, json!({}))?),
        (
            "embedding",
            model(place, Shape::EmbeddingGemma, 0, json!({"role": "embedding", "class": "on_demand"}))?,
        ),
    ];
    let names = models.each_ref().map(|(name, _)| *name);
    let before = resident()?;
    let site = Arc::new(
        place.start(models.map(|(name, model)| (name.to_owned(), model)).into_iter().collect()).await?,
    );
    // Whether the empty pool would load it.
    let mut can_fit = BTreeMap::new();
    for name in names {
        let plan = site.sarai.pool().plan(&[name]).await?;
        can_fit.insert(name, plan.iter().any(|place| place.refuse.is_none()));
    }
    let (tally, watch) = (tally(&site.sarai), Watch::start());
    let mut random = fastrand::Rng::with_seed(seed);
    let mut running: FuturesUnordered<JoinHandle<(&str, Result<()>)>> = FuturesUnordered::new();
    let (mut requests, mut refused, mut lost) = (0, Refused::default(), Vec::new());
    let mut count = |(name, ended): (&str, Result<()>)| {
        let Err(error) = ended else { return };
        match error.downcast_ref::<Error>() {
            Some(Error::InUse { .. }) => refused.in_use += 1,
            Some(Error::OverBudget { .. }) if !can_fit[name] => refused.too_large += 1,
            _ => lost.push(error.to_string()),
        }
    };
    let began = Instant::now();
    for action in 0..actions {
        let name = names[random.usize(..names.len())];
        let kind = random.u32(..10);
        requests += usize::from(kind < 6);
        let (site, words) = (Arc::clone(&site), random.usize(4..64));
        running.push(tokio::spawn(async move {
            let pool = site.sarai.pool();
            let ended = match kind {
                0..6 if name == "embedding" => site.embed(name, words, action as u64).await,
                0..6 => site.ask(name, words, action as u64).await.map(drop),
                6..8 => pool.load(name).await.map_err(Into::into),
                _ => match pool.unload(name).await {
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.into()),
                },
            };
            (name, ended)
        }));
        while running.len() >= AT_ONCE
            && let Some(ended) = running.next().await
        {
            count(ended?);
        }
        if (action + 1) % 50 == 0 {
            eprintln!("{} of {actions} actions, {:.0} s", action + 1, began.elapsed().as_secs_f64());
        }
    }
    while let Some(ended) = running.next().await {
        count(ended?);
    }
    let site = Arc::into_inner(site).ok_or("somebody still has the pool")?;
    println!(
        "{actions} actions, {requests} of them requests, in {:.0} s; refused: {} unloads of models in use, {} models larger than the budget",
        began.elapsed().as_secs_f64(),
        refused.in_use,
        refused.too_large
    );
    let mut checks = end(site, tally, watch, before).await?;
    checks.check(
        lost.is_empty(),
        format!(
            "requests lost: {}{}",
            lost.len(),
            lost.first().map(|e| format!(", {e}")).unwrap_or_default()
        ),
    );
    Ok(checks.failed())
}

/// What the pool rightly did not do.
#[derive(Debug, Default)]
struct Refused {
    /// Unloads of models in use.
    in_use: usize,
    /// Models that are larger than the budget, whatever is loaded.
    too_large: usize,
}

pub(crate) async fn five(place: &Place) -> Result<Vec<String>> {
    let names = ["m1", "m2", "m3", "m4", "m5"];
    let mut models = Map::new();
    for (copy, name) in names.iter().enumerate() {
        models.insert((*name).to_owned(), model(place, Shape::Omni7b, copy, json!({}))?);
    }
    let before = resident()?;
    let site = place.start(models).await?;
    let (tally, watch) = (tally(&site.sarai), Watch::start());
    for (seed, name) in (0..).zip(names) {
        let began = Instant::now();
        let answer = site.ask(name, 16, seed).await?;
        let n_ctx = answer.provenance.n_ctx.unwrap_or(0);
        println!(
            "{name}: answered after {:.1} s, n_ctx {n_ctx}, {} resident",
            began.elapsed().as_secs_f64(),
            resident()?
        );
    }
    Ok(end(site, tally, watch, before).await?.failed())
}

pub(crate) async fn switches(place: &Place, switches: usize) -> Result<Vec<String>> {
    let names = ["llama", "mistral"];
    let mut models = Map::new();
    for (copy, name) in names.iter().enumerate() {
        models.insert((*name).to_owned(), model(place, Shape::Omni7b, copy, json!({"context": 4000}))?);
    }
    let before = resident()?;
    let site = place.start(models).await?;
    let (tally, watch) = (tally(&site.sarai), Watch::start());
    let mut first = None;
    let mut last = Bytes::ZERO;
    let mut times = Vec::new();
    for switch in 0..=switches {
        let began = Instant::now();
        site.ask(names[switch % 2], 8, switch as u64).await?;
        times.push(began.elapsed());
        last = resident()?;
        // The first answer starts what a process has once: threads, the tables of the runtime.
        first = first.or(Some(last).filter(|_| switch == 1));
    }
    times.sort();
    let usage = site.sarai.pool().memory_usage().await?;
    let loaded = usage.models.iter().filter(|model| model.state == "ready").count();
    let mut checks = end(site, tally, watch, before).await?;
    checks.check(loaded == 1, format!("{loaded} model is loaded at the end"));
    let first = first.unwrap_or(last);
    let ratio = last.0 as f64 / first.0 as f64;
    checks.check(
        ratio <= 1.03,
        format!("{last} resident after {switches} switches, {first} after the first: {ratio:.3}"),
    );
    println!("a switch with its answer took {:.2} s (median)", times[times.len() / 2].as_secs_f64());
    Ok(checks.failed())
}

pub(crate) async fn together(place: &Place) -> Result<Vec<String>> {
    let host = Host::start().await?;
    let mut models = Map::new();
    models.insert("solar".to_owned(), json!({"backend": "ollama_http", "host": "lan", "fallback": "gguf_native", "path": place.file(Shape::Solar, 0)?}));
    models.insert("lfm2".to_owned(), model(place, Shape::Lfm2, 0, json!({}))?);
    models.insert("omni".to_owned(), model(place, Shape::Omni7b, 0, json!({}))?);
    let before = resident()?;
    let site = place.start_with_host(models, &host.url()).await?;
    let (tally, watch) = (tally(&site.sarai), Watch::start());
    let (solar, lfm2, omni) =
        tokio::join!(site.ask("solar", 16, 1), site.ask("lfm2", 64, 2), site.ask("omni", 32, 3));
    for (name, answer) in [("solar", solar?), ("lfm2", lfm2?), ("omni", omni?)] {
        println!(
            "{name}: {} tokens by {}",
            answer.completion_tokens.unwrap_or(0),
            answer.provenance.served_by
        );
    }
    let usage = site.sarai.pool().memory_usage().await?;
    let mut checks = end(site, tally, watch, before).await?;
    checks.check(usage.llms == 3, format!("{} LLMs are there at once", usage.llms));
    Ok(checks.failed())
}

pub(crate) async fn idle(place: &Place, time: Duration) -> Result<Vec<String>> {
    let mut models = Map::new();
    models.insert("lfm2".to_owned(), model(place, Shape::Lfm2, 0, json!({}))?);
    models.insert("llama".to_owned(), model(place, Shape::Llama1b, 0, json!({}))?);
    models.insert(
        "embedding".to_owned(),
        model(place, Shape::EmbeddingGemma, 0, json!({"role": "embedding"}))?,
    );
    let site = place.start(models).await?;
    for name in ["lfm2", "llama"] {
        site.ask(name, 16, 1).await?;
    }
    site.embed("embedding", 16, 1).await?;
    // Threads that were needed for the loads go after ten idle seconds.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let (computed_before, before) = (computed(), resident()?);
    tokio::time::sleep(time).await;
    let (ran, after) = (computed() - computed_before, resident()?);
    let part = ran.as_secs_f64() / time.as_secs_f64() * 100.0;
    let mut checks = Checks::new();
    checks.check(
        part < 0.05,
        format!(
            "{:.1} ms of CPU time in {} s: {part:.4} % of one CPU",
            ran.as_secs_f64() * 1e3,
            time.as_secs()
        ),
    );
    let grown = after.saturating_sub(before);
    checks.check(grown < Bytes(3_000_000), format!("{grown} more resident than before ({before})"));
    site.sarai.pool().shutdown(Duration::from_secs(60)).await;
    Ok(checks.failed())
}

//! A long session in short: pipelines that hear, see, answer and soften, while the host fails, runs are dropped and the budget
//! changes. The models are small ones made on the spot.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use sarai::{Audio, CallOptions, Image, Input, PipelineEvent, PipelineReport, Sarai};
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model, Projector};
use sarai_support::host::{Behaviour, Host};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::Result;
use crate::checks::{Checks, tally};
use crate::watch::resident;

const QUESTION: &[u8] = include_bytes!("../../config/demo/question.wav");
const PICTURE: &[u8] = include_bytes!("../../config/demo/picture.png");

/// Runs in flight at once.
const AT_ONCE: usize = 4;
/// When a run counts as stuck; the longest of these takes seconds.
const STUCK: Duration = Duration::from_secs(60);
/// How often what is resident at rest is looked at.
const RESTS: usize = 9;
/// How much more may be resident at the end than after the first runs.
const GROWTH: f64 = 1.05;
/// The width of the made models' embeddings.
const WIDTH: u32 = 192;
/// All models at once; the one that hears and sees with one other; just the one.
const BUDGETS: [Bytes; 3] = [Bytes(1_000_000_000), Bytes(150_000_000), Bytes(140_000_000)];

const PIPELINES: [&str; 3] = ["voice", "vision", "soft_hard"];

/// Pipelines as the demo's, on models with made-up weights, with a host of the row's own.
async fn start(folder: &tempfile::TempDir, url: &str) -> Result<Sarai> {
    let file = |name: &str| folder.path().join(name).with_added_extension("gguf");
    for (seed, (name, kind)) in
        (1..).zip([("lfm2", Kind::Lfm2), ("omni", Kind::Qwen2Vl), ("solar", Kind::Llama)])
    {
        Model::new(kind).seed(seed).write_to(file(name))?;
    }
    Projector::new(WIDTH).seed(1).write_to(file("mmproj"))?;
    let few = json!({"max_tokens": 24});
    let config = json!({
        // On this machine; what it claims to hold takes nothing of the budget.
        "hosts": {"lan": {"kind": "ollama", "url": url, "watch": false}},
        "models": {
            "lfm2": {"backend": "gguf_native", "path": file("lfm2"), "class": "preferred"},
            "omni": {"backend": "gguf_native", "path": file("omni"), "mmproj": file("mmproj"), "context": 2000},
            "solar": {
                "backend": "ollama_http", "host": "lan", "fallback": "gguf_native", "path": file("solar"),
                "on_stream_failure": "continue",
            },
        },
        "memory": {"max_ram_gb": 1, "max_concurrent_llms": 3},
        "sessions": {"path": folder.path().join("sessions"), "max_gb": 0},
        "pipelines": {
            "voice": {"input": "audio", "steps": [
                {"id": "stt", "model": "omni", "transcribe": "{{ input.audio }}", "sampling": few},
                {"id": "expert", "model": "solar", "prompt": "Datos sobre: {{ stt.text }}", "sampling": few},
                {"id": "tone", "model": "lfm2", "modulate": "{{ expert.text }}", "tone": "friendly", "sampling": few},
            ]},
            "vision": {"input": ["image", "text"], "steps": [
                {"id": "see", "model": "omni", "describe": "{{ input.image }}", "prompt": "{{ input.text }}", "sampling": few},
                {"id": "expert", "model": "solar", "prompt": "{{ see.text }} {{ input.text }}", "sampling": few},
            ]},
            "soft_hard": {"steps": [
                {"id": "opening", "model": "lfm2", "prompt": "{{ input.text }}", "sampling": few},
                {"id": "expert", "model": "solar", "prompt": "{{ input.text }}", "sampling": few},
                {"id": "tone", "model": "lfm2", "modulate": "{{ expert.text }}", "tone": "empathetic", "sampling": few},
            ]},
        },
    });
    // JSON is YAML.
    let path = folder.path().join("sarai.yaml");
    fs::write(&path, config.to_string())?;
    Ok(Sarai::from_file(path).await?)
}

/// What the host does next: mostly what it should.
fn behaviour(random: &mut fastrand::Rng) -> Behaviour {
    match random.u32(..12) {
        0 => Behaviour::Status(500, "out of order".to_owned()),
        1 => Behaviour::RetryAfter(503, 1),
        2 => Behaviour::CutAfter(random.usize(..3)),
        3 => Behaviour::ErrorLineAfter(1, "out of memory".to_owned()),
        4 => Behaviour::EndWithoutDone(2),
        5 => Behaviour::Html,
        6 => Behaviour::HangUpOnReuse,
        7 => Behaviour::NoModel,
        _ => Behaviour::Normal,
    }
}

/// Runs a pipeline to its end, or drops it after so many events.
async fn run(
    sarai: &Sarai,
    name: &str,
    input: Input,
    drop_after: Option<usize>,
) -> Result<Option<PipelineReport>> {
    let mut run = sarai.run(name, &input, CallOptions::default())?;
    let mut events = 0;
    while drop_after.is_none_or(|most| events < most) {
        events += 1;
        match run.next().await.ok_or("the run has no end")?? {
            PipelineEvent::Done(report) => return Ok(Some(report)),
            _ => continue,
        }
    }
    Ok(None)
}

type Running = FuturesUnordered<JoinHandle<Result<Option<PipelineReport>>>>;

/// What the runs came to.
#[derive(Debug, Default)]
struct Counts {
    whole: usize,
    dropped: usize,
    by_fallback: usize,
    handed_over: usize,
    lost: Vec<String>,
}

impl Counts {
    /// Waits for one of the runs; false when there is none left.
    async fn next(&mut self, running: &mut Running, sarai: &Sarai) -> Result<bool> {
        let Ok(ended) = tokio::time::timeout(STUCK, running.next()).await else {
            let status = sarai.pool().status().await?;
            return Err(format!("no run has ended for {STUCK:?}: {status:#?}").into());
        };
        let Some(ended) = ended else { return Ok(false) };
        self.add(ended?);
        Ok(true)
    }

    fn add(&mut self, ended: Result<Option<PipelineReport>>) {
        match ended {
            Ok(Some(report)) => {
                self.whole += 1;
                for answer in report.steps.iter().filter_map(|step| step.answer.as_ref()) {
                    self.by_fallback += usize::from(answer.provenance.fallback_reason.is_some());
                    self.handed_over += usize::from(!answer.handovers.is_empty());
                }
            }
            Ok(None) => self.dropped += 1,
            Err(error) => self.lost.push(error.to_string()),
        }
    }
}

/// What is resident when everything was loaded anew, has answered, and nothing runs: the median of several times, since what was
/// said last, and so what was touched, differs.
async fn at_rest(sarai: &Sarai, input: &Input) -> Result<Bytes> {
    sarai.pool().set_budget(BUDGETS[0]).await?;
    let (mut empty, mut loaded) = ([Bytes::ZERO; RESTS], [Bytes::ZERO; RESTS]);
    for (empty, loaded) in empty.iter_mut().zip(&mut loaded) {
        for model in sarai.pool().models() {
            sarai.pool().unload(model.as_str()).await?;
        }
        *empty = resident()?;
        for name in PIPELINES {
            run(sarai, name, input.clone(), None).await?;
        }
        *loaded = resident()?;
    }
    empty.sort();
    loaded.sort();
    println!("{} resident with nothing loaded, {} with all", empty[RESTS / 2], loaded[RESTS / 2]);
    Ok(loaded[RESTS / 2])
}

pub(crate) async fn pipelines(runs: usize, seed: u64) -> Result<Vec<String>> {
    let (folder, host) = (tempfile::tempdir()?, Host::start().await?);
    let sarai = Arc::new(start(&folder, &host.url()).await?);
    let input = Input::text("¿Qué es la memoria RAM?")
        .with_audio(Audio::new(QUESTION)?)
        .with_image(Image::new(PICTURE)?);
    let events = tally(&sarai);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut counts = Counts::default();
    let mut running: Running = FuturesUnordered::new();
    let (began, mut first) = (Instant::now(), Bytes::ZERO);
    for number in 0..runs {
        // The first runs start what a process has once: threads, caches, tables.
        if number == runs / 20 {
            while counts.next(&mut running, &sarai).await? {}
            host.behave(Behaviour::Normal);
            first = at_rest(&sarai, &input).await?;
        }
        if random.u32(..4) == 0 {
            host.behave(behaviour(&mut random));
        }
        if random.u32(..10) == 0 {
            sarai.pool().set_budget(BUDGETS[random.usize(..BUDGETS.len())]).await?;
        }
        let name = PIPELINES[random.usize(..PIPELINES.len())];
        let drop_after = (random.u32(..4) == 0).then(|| random.usize(..16));
        let (runs_on, input) = (Arc::clone(&sarai), input.clone());
        running.push(tokio::spawn(async move { run(&runs_on, name, input, drop_after).await }));
        while running.len() >= AT_ONCE && counts.next(&mut running, &sarai).await? {}
        if (number + 1) % 100 == 0 {
            host.forget_requests();
            eprintln!(
                "{} of {runs} runs, {:.0} s, {} resident",
                number + 1,
                began.elapsed().as_secs_f64(),
                resident()?
            );
        }
    }
    while counts.next(&mut running, &sarai).await? {}
    host.behave(Behaviour::Normal);
    let last = at_rest(&sarai, &input).await?;
    let status = sarai.pool().status().await?;
    sarai.shutdown(Duration::from_secs(60)).await;
    drop(sarai);
    let tally = events.await?;
    println!(
        "{runs} runs in {:.0} s: {} to their end, {} dropped; {} steps by the fallback, {} handed over in their middle; {} loads, {} evictions",
        began.elapsed().as_secs_f64(),
        counts.whole,
        counts.dropped,
        counts.by_fallback,
        counts.handed_over,
        tally.loads,
        tally.evictions
    );
    let mut checks = Checks::new();
    let lost = counts.lost.first().map(|error| format!(", {error}")).unwrap_or_default();
    checks.check(counts.lost.is_empty(), format!("runs lost: {}{lost}", counts.lost.len()));
    let busy: usize = status.slots.iter().map(|slot| slot.leases + slot.waiting).sum();
    checks.check(
        busy + status.waiting == 0,
        format!("requests that still run or wait: {}", busy + status.waiting),
    );
    let ratio = last.0 as f64 / first.0 as f64;
    checks.check(
        ratio <= GROWTH,
        format!("{last} resident at the end, {first} after the first {} runs: {ratio:.3}", runs / 20),
    );
    Ok(checks.failed())
}

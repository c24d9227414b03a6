//! Several models at once: what it takes, what it gains, and whether the budget holds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use directories::ProjectDirs;
use futures::StreamExt;
use sarai::core::config::{Class, Config, Place};
use sarai::core::scheduler::Phase;
use sarai::{
    Answer, AnswerEvent, Bytes, CallOptions, GenerateRequest, Image, MemoryUsage, Message, ModelPool,
    ModelRole, PoolEvent, Sampling,
};
use sarai_support::gguf::{Kind, Model, Projector, Shape};
use serde::Serialize;
use serde_json::json;

use super::args::{Common, ConcurrentArgs, ShapeArg};
use super::exit::Failure;
use super::files;
use super::output::Output;
use super::session::{Session, find, read};

/// What is shown to models that see, where no image is named.
const PICTURE: &[u8] = include_bytes!("../../config/demo/picture.png");
/// How often memory is looked at while the models work, at most.
const LOOKS: Duration = Duration::from_millis(50);
/// How many times as long as a look took nothing is looked at: the kernel walks the page tables of all that is loaded, and what
/// is to be measured should have the CPU for itself.
const REST: u32 = 100;
/// The width of the full-size Omni's embeddings, and of the tiny models'.
const WIDTHS: (u32, u32) = (3584, 192);

/// What came of it.
#[derive(Serialize)]
struct Report {
    runs: usize,
    tokens: u32,
    models: Vec<Row>,
    one_after_another: Total,
    at_once: Total,
    /// How many times as many tokens a second all together give as one after another.
    ratio: f64,
    budget_bytes: Bytes,
    /// The most that was measured while they worked.
    peak_bytes: Bytes,
    evictions: usize,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Row {
    model: String,
    served_by: String,
    fallback_reason: Option<String>,
    saw_image: bool,
    alone: Speed,
    at_once: Speed,
    measured_bytes: Option<Bytes>,
}

/// Medians over the runs.
#[derive(Clone, Copy, Serialize)]
struct Speed {
    first_token_ms: f64,
    tokens_per_second: f64,
}

#[derive(Serialize)]
struct Total {
    tokens: f64,
    seconds: f64,
    tokens_per_second: f64,
}

#[derive(Serialize)]
struct Check {
    what: &'static str,
    holds: bool,
    found: String,
}

pub(super) async fn concurrent(
    common: &Common,
    args: &ConcurrentArgs,
    output: &Output,
) -> Result<(), Failure> {
    let made = args.shape.map(|shape| made(shape, output)).transpose()?;
    let path = match &made {
        Some(made) => made.config.clone(),
        None => find(common.config.as_deref())?,
    };
    let resolved = read(common, &path)?;
    there(&resolved.config, &args.models)?;
    let image = args.image.as_deref().map(files::image).transpose()?;
    let image = image.map_or_else(|| Image::new(PICTURE), Ok);
    let image = image.map_err(|error| Failure::Usage(format!("the image: {error}")))?;
    let session = Session::start(resolved, output)?;
    let asked: Vec<Asked> = args
        .models
        .iter()
        .map(|model| Asked {
            model: model.clone(),
            image: sees(&session.config, model).then(|| image.clone()),
            tokens: args.tokens,
        })
        .collect();
    let report = measure(session.sarai.pool(), &asked, args, output).await?;
    show(&report, output)?;
    output.object(&report)?;
    session.close().await;
    let failed: Vec<&str> =
        report.checks.iter().filter(|check| !check.holds).map(|check| check.what).collect();
    if failed.is_empty() { Ok(()) } else { Err(Failure::Checks(failed.join("; "))) }
}

/// One request of the bench.
struct Asked {
    model: String,
    image: Option<Image>,
    tokens: u32,
}

/// What an answer took.
struct Took {
    answer: Answer,
    first: Duration,
    all: Duration,
    tokens: u32,
}

async fn measure(
    pool: &ModelPool,
    asked: &[Asked],
    args: &ConcurrentArgs,
    output: &Output,
) -> Result<Report, Failure> {
    output.note("loading the resident models, then the others");
    for (_, loaded) in pool.load_residents().await {
        loaded?;
    }
    for asked in asked {
        // The first answer loads whatever stands in, too.
        ask(pool, asked, "warm up").await?;
    }
    let watch = Watch::begin(pool);
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    let (mut alone_time, mut together_time) = (Duration::ZERO, Duration::ZERO);
    for run in 1..=args.runs {
        output.note(&format!("run {run} of {}: one after another, then all at once", args.runs));
        let began = Instant::now();
        for asked in asked {
            alone.push(ask(pool, asked, &format!("{run} alone")).await?);
        }
        alone_time += began.elapsed();
        let began = Instant::now();
        let words = format!("{run} together");
        let all = futures::future::join_all(asked.iter().map(|asked| ask(pool, asked, &words))).await;
        together.extend(all.into_iter().collect::<Result<Vec<_>, _>>()?);
        together_time += began.elapsed();
    }
    let usage = pool.memory_usage().await?;
    let (peak, evictions) = watch.end();
    let peak = peak.max(held(&usage));
    let own_bytes = |model: &str| {
        let own = usage.models.iter().filter(|held| held.model.as_str() == model && held.state == "ready");
        own.filter_map(|held| held.measured_bytes).reduce(|a, b| a + b)
    };
    let rows: Vec<Row> = asked
        .iter()
        .enumerate()
        .map(|(at, one)| {
            let own = |all: &[Took]| Speed::of(all.iter().skip(at).step_by(asked.len()));
            let last = &together[together.len() - asked.len() + at].answer.provenance;
            Row {
                model: one.model.clone(),
                served_by: last.served_by.to_string(),
                fallback_reason: last.fallback_reason.clone(),
                saw_image: one.image.is_some(),
                alone: own(&alone),
                at_once: own(&together),
                measured_bytes: own_bytes(&one.model),
            }
        })
        .collect();
    let (one_after_another, at_once) = (Total::of(&alone, alone_time), Total::of(&together, together_time));
    let ratio = at_once.tokens_per_second / one_after_another.tokens_per_second;
    let resident =
        rows.iter().filter(|row| row.measured_bytes.is_some() || !row.served_by.starts_with("gguf")).count();
    let (wrote, budget) = (together.iter().filter(|took| took.tokens > 0).count(), usage.budget_bytes);
    let check = |what, holds, found| Check { what, holds, found };
    let checks = vec![
        check("memory within the budget", peak <= budget, format!("{peak} of {budget}")),
        check("nothing evicted", evictions == 0, format!("{evictions} evictions")),
        check("every request answered", wrote == together.len(), format!("{wrote} of {}", together.len())),
        check("all models ready at once", resident == rows.len(), format!("{resident} of {}", rows.len())),
        check("at least as fast as one after another", ratio >= 1.0, format!("{ratio:.2} times")),
    ];
    Ok(Report {
        runs: args.runs,
        tokens: args.tokens,
        models: rows,
        one_after_another,
        at_once,
        ratio,
        budget_bytes: budget,
        peak_bytes: peak,
        evictions,
        checks,
    })
}

/// Asks a model to write so many tokens. What it is asked begins with `words`, so that no request is an earlier one again.
async fn ask(pool: &ModelPool, asked: &Asked, words: &str) -> Result<Took, Failure> {
    let text = format!("{words}: tell me about the sea, the wind and the stars, and do not stop.");
    let message = Message::user(text).with_images(asked.image.iter().cloned().collect());
    let sampling = Sampling {
        temperature: Some(0.0),
        seed: Some(1),
        max_tokens: Some(asked.tokens),
        ..Sampling::default()
    };
    let request = GenerateRequest::chat(vec![message]).with_sampling(sampling);
    let began = Instant::now();
    let mut stream = pool.handle(&asked.model)?.generate(request, CallOptions::default()).await?;
    let (mut first, mut pieces) = (None, 0);
    loop {
        match stream.next().await.ok_or(sarai::Error::ShuttingDown)?? {
            AnswerEvent::Text(_) => {
                first.get_or_insert_with(|| began.elapsed());
                pieces += 1;
            }
            AnswerEvent::Done(answer) => {
                let tokens = answer.completion_tokens.unwrap_or(pieces);
                let all = began.elapsed();
                return Ok(Took { first: first.unwrap_or(all), all, tokens, answer });
            }
        }
    }
}

/// What was measured of all models together.
fn held(usage: &MemoryUsage) -> Bytes {
    usage.models.iter().filter_map(|model| model.measured_bytes).sum()
}

/// Looks at memory and at evictions while the models work.
struct Watch {
    peak: Arc<AtomicU64>,
    evictions: Arc<AtomicU64>,
    tasks: [tokio::task::JoinHandle<()>; 2],
}

impl Watch {
    fn begin(pool: &ModelPool) -> Self {
        let (peak, evictions) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let memory = {
            let (pool, peak) = (pool.clone(), Arc::clone(&peak));
            tokio::spawn(async move {
                loop {
                    let began = Instant::now();
                    let Ok(usage) = pool.memory_usage().await else { return };
                    let took = began.elapsed();
                    peak.fetch_max(held(&usage).0, Ordering::Relaxed);
                    tracing::debug!(?took, "memory looked at");
                    tokio::time::sleep((took * REST).max(LOOKS)).await;
                }
            })
        };
        let events = {
            let (mut events, evictions) = (pool.events(), Arc::clone(&evictions));
            tokio::spawn(async move {
                while let Some(event) = events.next().await {
                    if matches!(event, PoolEvent::Slot(change) if change.to == Phase::Unloading) {
                        evictions.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        };
        Self { peak, evictions, tasks: [memory, events] }
    }

    fn end(self) -> (Bytes, usize) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
        let evictions = usize::try_from(self.evictions.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        (Bytes(self.peak.load(Ordering::Relaxed)), evictions)
    }
}

impl Speed {
    fn of<'t>(all: impl Iterator<Item = &'t Took> + Clone) -> Self {
        let decoding = |took: &Took| {
            let time = took.all.saturating_sub(took.first).as_secs_f64();
            f64::from(took.tokens.saturating_sub(1)) / time.max(f64::EPSILON)
        };
        let speed = |took: &Took| took.answer.tokens_per_second.unwrap_or_else(|| decoding(took));
        Self {
            first_token_ms: median(all.clone().map(|took| took.first.as_secs_f64() * 1e3)),
            tokens_per_second: median(all.map(speed)),
        }
    }
}

impl Total {
    fn of(all: &[Took], time: Duration) -> Self {
        let tokens: f64 = all.iter().map(|took| f64::from(took.tokens)).sum();
        let seconds = time.as_secs_f64();
        Self { tokens, seconds, tokens_per_second: tokens / seconds.max(f64::EPSILON) }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn show(report: &Report, output: &Output) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "MODEL",
        "FIRST ms",
        "ALONE t/s",
        "FIRST ms",
        "AT ONCE t/s",
        "MEASURED",
        "SERVED BY",
    ]);
    for row in &report.models {
        let bytes = row.measured_bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
        let image = if row.saw_image { " (image)" } else { "" };
        table.add_row([
            format!("{}{image}", row.model),
            format!("{:.0}", row.alone.first_token_ms),
            format!("{:.1}", row.alone.tokens_per_second),
            format!("{:.0}", row.at_once.first_token_ms),
            format!("{:.1}", row.at_once.tokens_per_second),
            bytes,
            row.served_by.clone(),
        ]);
    }
    for column in table.column_iter_mut().skip(1).take(5) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    output.line(&table.to_string())?;
    let Report { one_after_another, at_once, ratio, .. } = report;
    output.line(&format!(
        "one after another {:.1} tokens/s, at once {:.1} tokens/s: {ratio:.2} times",
        one_after_another.tokens_per_second, at_once.tokens_per_second
    ))?;
    for Check { what, holds, found } in &report.checks {
        output.line(&format!("{} {what}: {found}", if *holds { "ok  " } else { "FAIL" }))?;
    }
    Ok(())
}

/// Whether the configuration has these models as LLMs, with a host or a file that is there.
fn there(config: &Config, models: &[String]) -> Result<(), Failure> {
    for name in models {
        let of_that_name = |(own, _): &(&sarai::ModelName, _)| own.as_str() == name;
        let Some((_, model)) = config.models.iter().find(of_that_name) else {
            return Err(sarai::Error::UnknownModel { model: name.clone(), nearest: None }.into());
        };
        let place = |place: &Place| match place {
            Place::Gguf(file) => file.path.exists(),
            Place::Hosts { .. } | Place::Model(_) => true,
        };
        if model.role != ModelRole::Llm || !model.places.iter().any(place) {
            return Err(Failure::Usage(format!(
                "model {name} has neither a host nor a file that is there; --shape tiny or full makes files to try with"
            )));
        }
    }
    Ok(())
}

fn sees(config: &Config, model: &str) -> bool {
    let own = config.models.iter().find(|(name, _)| name.as_str() == model);
    own.is_some_and(|(_, model)| {
        model.places.iter().any(|place| matches!(place, Place::Gguf(file) if file.mmproj.is_some()))
    })
}

/// Synthetic files and a configuration for them.
struct Made {
    config: PathBuf,
    /// Of the tiny ones, which go with it.
    _folder: tempfile::TempDir,
}

/// Makes files and a configuration: SOLAR's host is not there, so that its file stands in.
fn made(shape: ShapeArg, output: &Output) -> Result<Made, Failure> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| Failure::Io { what, source }
    };
    let temporary = tempfile::tempdir().map_err(io("cannot make a temporary folder"))?;
    let folder = match shape {
        ShapeArg::Tiny => temporary.path().to_owned(),
        ShapeArg::Full => ProjectDirs::from("", "", "sarai")
            .ok_or_else(|| Failure::Usage("no home folder to put the models in".to_owned()))?
            .cache_dir()
            .join("shapes"),
    };
    std::fs::create_dir_all(&folder).map_err(io(&format!("cannot make the folder {}", folder.display())))?;
    let file = |name: &str| folder.join(name).with_added_extension("gguf");
    let make = |path: &Path, make: &dyn Fn(&Path) -> Result<(), sarai_support::gguf::Error>| {
        if path.exists() {
            return Ok(());
        }
        output.note(&format!("writing {}", path.display()));
        make(path).map_err(|source| Failure::Synthesis { path: path.to_owned(), source })
    };
    let (helper, solar, lfm2, omni, mmproj) = match shape {
        ShapeArg::Full => {
            let [helper, solar, lfm2, omni] =
                [Shape::EmbeddingGemma, Shape::Solar, Shape::Lfm2, Shape::Omni7b];
            output.note(&format!(
                "files of real models' sizes in {}: 15 GB in all, kept for the next time",
                folder.display()
            ));
            for shape in [helper, solar, lfm2, omni] {
                make(&file(shape.name()), &|path| shape.write_to(path))?;
            }
            let mmproj = file("omni-7b-mmproj-f16");
            make(&mmproj, &|path| Projector::of_omni_7b(WIDTHS.0).write_to(path))?;
            (file(helper.name()), file(solar.name()), file(lfm2.name()), file(omni.name()), mmproj)
        }
        ShapeArg::Tiny => {
            let tiny = |name: &str, kind: Kind, seed: u64| {
                let path = file(name);
                make(&path, &|path| Model::new(kind.clone()).seed(seed).endless(true).write_to(path))?;
                Ok::<_, Failure>(path)
            };
            let mmproj = file("mmproj");
            make(&mmproj, &|path| Projector::new(WIDTHS.1).write_to(path))?;
            let helper = file("helper");
            make(&helper, &|path| Model::new(Kind::GemmaEmbedding).write_to(path))?;
            (
                helper,
                tiny("solar", Kind::Llama, 1)?,
                tiny("lfm2", Kind::Lfm2, 2)?,
                tiny("omni", Kind::Qwen2Vl, 3)?,
                mmproj,
            )
        }
    };
    let models = BTreeMap::from([
        (
            "embedding",
            json!({"role": "embedding", "class": Class::Resident, "backend": "gguf_native", "path": helper}),
        ),
        (
            "solar",
            json!({"backend": "ollama_http", "fallback": "gguf_native", "host": "absent", "path": solar, "context": 1000}),
        ),
        ("lfm2", json!({"backend": "gguf_native", "path": lfm2, "context": 1000})),
        ("omni", json!({"backend": "gguf_native", "path": omni, "mmproj": mmproj, "context": 2000})),
    ]);
    // Nothing listens on port 9 of this machine; where something does, it is no Ollama.
    let config = json!({
        "hosts": {"absent": {"kind": "ollama", "url": "http://127.0.0.1:9", "watch": false}},
        "models": models,
        "memory": {"max_ram_gb": match shape { ShapeArg::Tiny => 2.0, ShapeArg::Full => 18.0 }, "max_concurrent_llms": 3},
        "sessions": {"max_gb": 0},
    });
    let path = temporary.path().join("sarai.yaml");
    // JSON is YAML.
    std::fs::write(&path, config.to_string()).map_err(io("cannot write the configuration"))?;
    Ok(Made { config: path, _folder: temporary })
}

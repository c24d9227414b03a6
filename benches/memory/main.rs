//! What loads are expected to take of memory, beside what they really take once a prompt was read:
//! `cargo bench --bench memory`. Ends with an error where one is off by more than a twentieth. Linux only.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use comfy_table::{Table, presets};
use futures::StreamExt;
use sarai::{GenerateRequest, Sampling};
use sarai_agents::llama::{GgufBackend, GgufSettings};
use sarai_core::backend::{Backend, LoadRequest, Model};
use sarai_core::config::{Context, Weights};
use sarai_core::memory::Estimate;
use sarai_core::request::{Capability, Delta};
use sarai_core::units::Bytes;
use sarai_support::gguf::Shape;

#[path = "../compare/prompt.rs"]
mod prompt;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Compares estimates with what loads really take.
#[derive(Debug, Parser)]
#[command(name = "memory", bin_name = "cargo bench --bench memory --")]
struct Args {
    /// GGUF files of your own; without them, synthetic ones of real models' shapes
    files: Vec<PathBuf>,
    /// Where the synthetic models are kept; those that are missing are written
    #[arg(long, value_name = "DIR", default_value = "target/shapes")]
    shapes: PathBuf,
    /// The memory that the context is chosen for, in GB
    #[arg(long, value_name = "GB", default_value_t = 24.0)]
    available: f64,
    /// Tokens of the text that is read before memory is looked at: what a shorter one does not need of a buffer is not resident
    #[arg(long, value_name = "N", default_value_t = 512)]
    tokens: usize,
    /// The context, in tokens; without it the one that the memory allows
    #[arg(long, value_name = "N")]
    context: Option<u32>,
    /// By which part estimates may be off; more is an error
    #[arg(long, value_name = "PART", default_value_t = 0.05)]
    within: f64,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// A model that was loaded and has read.
#[derive(Debug)]
struct Measured {
    estimate: Estimate,
    file_backed: Bytes,
    anonymous: Bytes,
}

impl Measured {
    fn total(&self) -> Bytes {
        self.file_backed + self.anonymous
    }

    /// The estimate, beside what was measured.
    fn ratio(&self) -> f64 {
        self.estimate.total().0 as f64 / self.total().0 as f64
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header([
        "file",
        "held",
        "n_ctx",
        "weights",
        "kv",
        "compute",
        "overhead",
        "estimate",
        "file-backed",
        "anonymous",
        "measured",
        "estimate / measured",
    ]);
    let mut off = Vec::new();
    for path in files(&args)? {
        for weights in [Weights::Mmap, Weights::Repack] {
            let measured = measure(&args, &path, weights).await?;
            let ratio = measured.ratio();
            let near = (ratio - 1.0).abs() <= args.within;
            if !near {
                off.push(format!("{} {weights:?}: {ratio:.3}", path.display()));
            }
            table.add_row(row(&path, weights, &measured));
        }
    }
    println!("{table}");
    if off.is_empty() {
        return Ok(());
    }
    Err(format!("off by more than {}: {}", args.within, off.join(", ")).into())
}

fn files(args: &Args) -> Result<Vec<PathBuf>> {
    if !args.files.is_empty() {
        return Ok(args.files.clone());
    }
    fs::create_dir_all(&args.shapes)?;
    Shape::ALL
        .into_iter()
        .map(|shape| {
            let path = args.shapes.join(shape.name()).with_added_extension("gguf");
            if !path.exists() {
                eprintln!("writing {}", path.display());
                shape.write_to(&path)?;
            }
            Ok(path)
        })
        .collect()
}

async fn measure(args: &Args, path: &Path, weights: Weights) -> Result<Measured> {
    let available = Bytes::from_gb(args.available);
    eprintln!("{} {weights:?}", path.display());
    // What a file is for shows when it is estimated: one that reads whole texts does not generate.
    let backend = |purpose| {
        let defaults = GgufSettings::new(path, purpose);
        let context = args.context.map_or(defaults.context, Context::Fixed);
        GgufBackend::new(GgufSettings { weights, context, ..defaults })
    };
    let mut backend_for = (backend(Capability::Generate), Capability::Generate);
    if backend_for.0.estimate(available).await.is_err() {
        backend_for = (backend(Capability::Embed), Capability::Embed);
    }
    let (backend, purpose) = backend_for;
    let estimate = backend.estimate(available).await?;
    let before = resident(path)?;
    let request = LoadRequest::new(estimate.clone());
    let model = backend.load(request).await?;
    read(&*model, purpose, args.tokens).await?;
    let after = resident(path)?;
    model.unload().await;
    Ok(Measured { estimate, file_backed: after.0 - before.0, anonymous: after.1 - before.1 })
}

async fn read(model: &dyn Model, purpose: Capability, tokens: usize) -> Result<()> {
    let text = prompt::words(tokens, 1);
    if purpose == Capability::Embed {
        model.embed(vec![text]).await?;
        return Ok(());
    }
    let sampling = Sampling { max_tokens: Some(2), temperature: Some(0.0), ..Sampling::default() };
    let mut answer = model.generate(GenerateRequest::raw(text).with_sampling(sampling)).await?;
    while let Some(delta) = answer.next().await {
        if let Delta::Done(_) = delta? {
            break;
        }
    }
    Ok(())
}

/// What is resident of the process's maps of the file, and of memory that no file backs.
fn resident(file: &Path) -> Result<(Bytes, Bytes)> {
    let file = fs::canonicalize(file)?;
    let (mut mapped, mut anonymous) = (Bytes::ZERO, Bytes::ZERO);
    let mut is_file = false;
    for line in fs::read_to_string("/proc/self/smaps")?.lines() {
        let kilobytes =
            |rest: &str| rest.trim().strip_suffix("kB").and_then(|n| n.trim().parse::<u64>().ok());
        if let Some(bytes) = line.strip_prefix("Rss:").and_then(kilobytes).map(|kb| Bytes(kb * 1024)) {
            mapped += if is_file { bytes } else { Bytes::ZERO };
        } else if let Some(bytes) = line.strip_prefix("Anonymous:").and_then(kilobytes) {
            anonymous += Bytes(bytes * 1024);
        } else if line.split(' ').next().is_some_and(|first| first.contains('-') && !first.ends_with(':')) {
            is_file = line.splitn(6, ' ').nth(5).is_some_and(|path| Path::new(path.trim_start()) == file);
        }
    }
    Ok((mapped, anonymous))
}

fn row(path: &Path, weights: Weights, measured: &Measured) -> [String; 12] {
    let Measured { estimate, file_backed, anonymous } = measured;
    let megabytes = |bytes: Bytes| format!("{:.1}", bytes.0 as f64 / 1e6);
    [
        path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        format!("{weights:?}").to_lowercase(),
        estimate.n_ctx.map(|n| n.to_string()).unwrap_or_default(),
        megabytes(estimate.weights),
        megabytes(estimate.kv),
        megabytes(estimate.compute),
        megabytes(estimate.overhead),
        megabytes(estimate.total()),
        megabytes(*file_backed),
        megabytes(*anonymous),
        megabytes(measured.total()),
        format!("{:.3}", measured.ratio()),
    ]
}

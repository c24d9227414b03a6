use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::peer::Peer;
use crate::rows::Row;
use crate::shapes::Shapes;
use crate::{Result, say};

/// Measures sarai beside llama.cpp's own programs.
#[derive(Debug, Parser)]
#[command(name = "compare", bin_name = "cargo bench --bench compare --")]
pub(crate) struct Args {
    /// The rows to measure; all if none is named
    rows: Vec<Row>,
    /// Where the models are kept; those that are missing are written
    #[arg(long, value_name = "DIR", default_value = "target/shapes")]
    shapes: PathBuf,
    /// What benches/compare/build_peer has made
    #[arg(long, value_name = "DIR", default_value = "target/peer")]
    peer: PathBuf,
    /// CPU threads for each model, on both sides [default: all CPUs]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Runs of each measurement
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Seconds that decoding is watched for where several models decode at once
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    window: u64,
    /// Row `single` without SOLAR's shape, which takes most of its time
    #[arg(long)]
    no_solar: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the rows measure with.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) shapes: Shapes,
    pub(crate) peer: Peer,
    pub(crate) threads: usize,
    runs: u64,
    pub(crate) window: Duration,
    /// Whether row `single` measures SOLAR's shape, too.
    pub(crate) solar: bool,
}

impl Args {
    pub(crate) fn rows(&self) -> &[Row] {
        if self.rows.is_empty() { Row::value_variants() } else { &self.rows }
    }

    pub(crate) fn bench(&self) -> Result<Bench> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Bench {
            shapes: Shapes::at(&self.shapes)?,
            peer: Peer::at(&self.peer),
            threads: self.threads.unwrap_or(cpus),
            runs: self.runs,
            window: Duration::from_secs(self.window),
            solar: !self.no_solar,
        })
    }
}

impl Bench {
    /// The numbers of the runs, each said as it begins.
    pub(crate) fn runs(&self, what: &str) -> impl Iterator<Item = u64> {
        (0..self.runs).inspect(move |run| say(&format!("  {what}, run {} of {}", run + 1, self.runs)))
    }
}

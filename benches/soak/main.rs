//! Does the budget hold? Models come and go for minutes while memory is watched: `cargo bench --bench soak -- random`.
//! Ends with an error when a check fails. Linux only.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

mod checks;
mod pipelines;
mod rows;
mod site;
mod watch;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Watches memory while models come and go.
#[derive(Debug, Parser)]
#[command(name = "soak", bin_name = "cargo bench --bench soak --")]
struct Args {
    /// What is done meanwhile
    #[command(subcommand)]
    row: Row,
    /// Where the synthetic models are kept; those that are missing are written
    #[arg(long, value_name = "DIR", default_value = "target/shapes", global = true)]
    shapes: PathBuf,
    /// The budget in GB, or a preset: low, medium, high, very_high, auto
    #[arg(long, value_name = "BUDGET", default_value = "6", global = true)]
    budget: String,
    /// Given by cargo
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Row {
    /// Random requests, loads and unloads over six models
    Random {
        /// How many
        #[arg(long, value_name = "N", default_value_t = 500)]
        actions: usize,
        /// The same actions for the same seed
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
    },
    /// Five models of 7B one after another
    Five,
    /// From one model to the other and back
    Switches {
        /// How often
        #[arg(long, value_name = "N", default_value_t = 50)]
        switches: usize,
    },
    /// One model on a host and two from files at the same time
    Together,
    /// Pipelines on small models with a host that fails, runs that are dropped, and a budget that changes
    Pipelines {
        /// How many
        #[arg(long, value_name = "N", default_value_t = 2_000)]
        runs: usize,
        /// The same runs for the same seed
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
    },
    /// Three loaded models and nothing to do: what does watching the machine cost?
    Idle {
        /// How long
        #[arg(long, value_name = "N", default_value_t = 10)]
        minutes: u64,
    },
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).init();
    let Args { row, shapes, budget, .. } = Args::parse();
    let place = site::Place { shapes, budget };
    let failed = match row {
        Row::Random { actions, seed } => rows::random(&place, actions, seed).await?,
        Row::Five => rows::five(&place).await?,
        Row::Switches { switches } => rows::switches(&place, switches).await?,
        Row::Together => rows::together(&place).await?,
        Row::Pipelines { runs, seed } => pipelines::pipelines(runs, seed).await?,
        Row::Idle { minutes } => rows::idle(&place, Duration::from_secs(minutes * 60)).await?,
    };
    match failed.as_slice() {
        [] => Ok(()),
        failed => Err(failed.join("; ").into()),
    }
}

//! sarai side by side with llama.cpp's own programs, on files as large as real models, with the bar that each figure is
//! held to. The peer is built once, by `benches/compare/build_peer`.
//!
//! `cargo bench --bench compare -- [ROW]... [--shapes DIR] [--peer DIR] [--threads N] [--runs N] [--no-solar] [--json]`
//!
//! Figures are medians; where two sides are compared, their runs take turns. Whoever wants figures to rely on leaves the
//! machine alone meanwhile.

mod args;
mod machine;
mod ours;
mod peer;
mod prompt;
mod report;
mod rows;
mod shapes;
mod statistics;

use std::io::{self, Write};
use std::process::ExitCode;

use args::Args;
use clap::Parser;
use machine::Machine;
use report::Report;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() -> ExitCode {
    match compare(&Args::parse()).await {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Measures the rows one after another. One that fails does not keep the others from being shown.
async fn compare(args: &Args) -> Result<ExitCode> {
    let bench = args.bench()?;
    let mut report = Report::new(Machine::read(), bench.peer.version(), bench.threads);
    let mut code = ExitCode::SUCCESS;
    for row in args.rows() {
        say(&format!("{} ...", row.name()));
        match row.measure(&bench).await {
            Ok(figures) => report.add(row.name(), figures),
            Err(error) => {
                say(&format!("{}: {error}", row.name()));
                code = ExitCode::FAILURE;
            }
        }
    }
    let text = if args.json { report.json()? } else { report.table() };
    writeln!(io::stdout(), "{text}")?;
    Ok(code)
}

/// Something to know beside the result.
fn say(line: &str) {
    // Where stderr is gone there is nobody to tell.
    let _ = writeln!(io::stderr(), "{line}");
}

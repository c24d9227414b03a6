//! The command line: data to stdout, everything else to stderr.

mod args;
mod bench;
mod chat;
mod check;
mod demo;
mod exit;
mod files;
mod interrupt;
mod media;
mod output;
mod progress;
mod ps;
mod requests;
mod run;
mod session;
mod simulate;
mod table;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use args::{Args, BenchCommand, Command};
use exit::Failure;
use output::Output;

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => error.exit(),
    };
    log_to_stderr();
    let output = Output::new(args.json);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return output
                .fail(&Failure::Io { what: "cannot start the async runtime".to_owned(), source: error });
        }
    };
    let result = runtime.block_on(interrupt::or_interrupted(dispatch(args, &output), &output));
    // Threads that compute a step see that nobody reads any more; the process need not wait for them.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of stdout left (`sarai ... | head`): not an error of ours.
        Err(Failure::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => output.fail(&failure),
    }
}

async fn dispatch(args: Args, output: &Output) -> Result<(), Failure> {
    let Args { common, command, .. } = args;
    match command {
        Command::Demo(demo) => demo::demo(&common, &demo, output).await,
        Command::Chat(chat) => chat::chat(&common, &chat, output).await,
        Command::Embed(embed) => requests::embed(&common, &embed, output).await,
        Command::Rerank(rerank) => requests::rerank(&common, &rerank, output).await,
        Command::Transcribe(args) => media::transcribe(&common, &args, output).await,
        Command::Describe(args) => media::describe(&common, &args, output).await,
        Command::Modulate(args) => media::modulate(&common, &args, output).await,
        Command::Route(route) => requests::route(&common, &route, output).await,
        Command::Run(run) => run::run(&common, &run, output).await,
        Command::Ps => ps::ps(&common, output).await,
        Command::Plan(plan) => ps::plan(&common, &plan, output).await,
        Command::Simulate(simulate) => simulate::simulate(&common, &simulate, output).await,
        Command::Bench(BenchCommand::Concurrent(args)) => bench::concurrent(&common, &args, output).await,
        Command::Unload(unload) => ps::unload(&common, &unload, output).await,
        Command::Check(check) => check::check(&common, &check, output),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "sarai", &mut script);
            output.bytes(&script)
        }
        Command::Man => {
            let mut page = Vec::new();
            let rendered = clap_mangen::Man::new(Args::command()).render(&mut page);
            rendered.map_err(|source| Failure::Io { what: "cannot make the page".to_owned(), source })?;
            output.bytes(&page)
        }
    }
}

/// `SARAI_LOG` says what is logged, as `RUST_LOG` does elsewhere; errors alone if it is not set.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("SARAI_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colour).init();
}

/// Writes a line for the person at the terminal.
fn say(line: &str) {
    // A stderr that is gone leaves nobody to tell.
    let _ = writeln!(anstream::stderr(), "{line}");
}

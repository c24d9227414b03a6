//! `sarai simulate`: what a trace of requests would make the pool do, by budget and by way of evicting.

use std::time::Duration;

use comfy_table::Table;
use sarai::core::pool::{Replay, Replayed, TracedRequest};
use sarai::core::scheduler::Eviction;
use sarai::core::units::{Bytes, ModelName};
use serde::Deserialize;
use serde_json::json;

use super::args::{Common, SimulateArgs};
use super::exit::Failure;
use super::files;
use super::output::Output;
use super::session::Session;
use super::table::table;

/// A line of a trace.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Seconds from the start.
    time: f64,
    model: String,
    /// Seconds that the answer takes.
    #[serde(default)]
    seconds: Option<f64>,
}

pub(super) async fn simulate(common: &Common, args: &SimulateArgs, output: &Output) -> Result<(), Failure> {
    let text = files::text(&args.trace).await?;
    let trace = parse(&text, args)
        .map_err(|problem| Failure::Usage(format!("{}, {problem}", args.trace.display())))?;
    let session = Session::open(common, output)?;
    let policies = args.eviction.map_or(vec![Eviction::CostAware, Eviction::Lru], |one| vec![one.into()]);
    let budgets =
        if args.budgets.is_empty() { vec![None] } else { args.budgets.iter().copied().map(Some).collect() };
    let mut replayed = Vec::new();
    for budget in budgets {
        for eviction in &policies {
            let replay = Replay {
                budget: budget.map(Bytes::from_gb),
                max_concurrent_llms: None,
                eviction: *eviction,
                load_time_per_gb: Duration::from_secs_f64(args.load_seconds_per_gb),
            };
            replayed.push(session.sarai.pool().simulate(&trace, &replay).await?);
        }
    }
    session.close().await;
    output.line(&outcomes(&replayed).to_string())?;
    if let Some(one) = replayed.first().filter(|one| !one.assumed_load_times.is_empty()) {
        let names: Vec<String> = one.assumed_load_times.iter().map(ToString::to_string).collect();
        output.note(&format!(
            "not loaded yet, so that {} s for each GB are assumed: {}",
            args.load_seconds_per_gb,
            names.join(", ")
        ));
    }
    output.object(&json!({"trace": args.trace, "simulations": replayed}))
}

/// The requests of a trace in CSV or, where it begins with a brace, JSON lines; in the order of their times.
fn parse(text: &str, args: &SimulateArgs) -> Result<Vec<TracedRequest>, String> {
    let lines: Vec<(u64, Line)> = if text.trim_start().starts_with('{') {
        let numbered = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
        let parse = |(line, number)| match serde_json::from_str(line) {
            Ok(line) => Ok((number, line)),
            Err(error) => Err(format!("line {number}: {error}")),
        };
        numbered.map(parse).collect::<Result<_, _>>()?
    } else {
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
        let headers = reader.headers().map_err(|error| error.to_string())?.clone();
        for column in ["time", "model"] {
            if !headers.iter().any(|header| header == column) {
                return Err(format!(
                    "line 1: no column {column:?}; a trace has time, model and, if you like, seconds"
                ));
            }
        }
        let parse = |record: csv::Result<csv::StringRecord>| {
            let record = record.map_err(|error| error.to_string())?;
            let number = record.position().map_or(0, csv::Position::line);
            let line =
                record.deserialize(Some(&headers)).map_err(|error| format!("line {number}: {error}"))?;
            Ok((number, line))
        };
        reader.records().map(parse).collect::<Result<_, String>>()?
    };
    let mut trace = lines
        .into_iter()
        .map(|(number, line)| request(number, &line, args))
        .collect::<Result<Vec<_>, _>>()?;
    if trace.is_empty() {
        return Err("it has no requests".to_owned());
    }
    trace.sort_by_key(|request| request.at);
    Ok(trace)
}

fn request(number: u64, line: &Line, args: &SimulateArgs) -> Result<TracedRequest, String> {
    let seconds = |what: &str, seconds: f64| {
        Duration::try_from_secs_f64(seconds)
            .map_err(|_| format!("line {number}: {what} is not a number of seconds"))
    };
    let model: ModelName =
        line.model.parse().map_err(|_| format!("line {number}: {:?} is no model's name", line.model))?;
    Ok(TracedRequest {
        at: seconds("time", line.time)?,
        model,
        runs: seconds("seconds", line.seconds.unwrap_or(args.answer_seconds))?,
    })
}

fn outcomes(replayed: &[Replayed]) -> Table {
    let mut table = table(
        [
            "BUDGET",
            "EVICTION",
            "LOADS",
            "EVICTIONS",
            "MISSES",
            "LOADING",
            "LOADED",
            "WAIT P50",
            "WAIT P99",
            "NOT SERVED",
        ],
        &[0, 2, 3, 4, 5, 6, 7, 8],
    );
    for Replayed { budget_bytes, eviction, simulated, .. } in replayed {
        table.add_row([
            budget_bytes.to_string(),
            match eviction {
                Eviction::CostAware => "cost_aware".to_owned(),
                Eviction::Lru => "lru".to_owned(),
            },
            simulated.loads.to_string(),
            simulated.evictions.to_string(),
            format!("{} of {}", simulated.misses, simulated.requests),
            format!("{:.1} s", simulated.load_seconds),
            simulated.bytes_loaded.to_string(),
            format!("{:.2} s", simulated.wait_p50_seconds),
            format!("{:.2} s", simulated.wait_p99_seconds),
            not_served(&simulated.refused),
        ]);
    }
    table
}

fn not_served(refused: &std::collections::BTreeMap<String, usize>) -> String {
    if refused.is_empty() {
        return "-".to_owned();
    }
    refused.iter().map(|(why, count)| format!("{count} {why}")).collect::<Vec<_>>().join(", ")
}

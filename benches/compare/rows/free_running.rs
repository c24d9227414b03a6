//! What the arrangement between models gains: language models' threads stand back behind a helper's, and where nothing else
//! keeps them apart, models share the CPUs out.

use sarai::agents::llama::set_free_running;

use super::helper;
use crate::Result;
use crate::args::Bench;
use crate::report::{Bar, Figure};
use crate::statistics::{median, p99};

/// Of each way.
#[derive(Debug, Default)]
struct Measured {
    latencies: Vec<f64>,
    speeds: Vec<f64>,
}

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let (mut arranged, mut free) = (Measured::default(), Measured::default());
    for run in bench.runs("free_running") {
        for (is_free, measured) in [(false, &mut arranged), (true, &mut free)] {
            set_free_running(is_free);
            let pass = once(bench, run, measured).await;
            set_free_running(false);
            pass?;
        }
    }
    let against = "the same, each model as if it were alone";
    Ok(vec![
        Figure {
            what: "embedding p99 while SOLAR, LFM2 and 1B decode".to_owned(),
            unit: "ms",
            ours: median(&arranged.latencies),
            against: against.to_owned(),
            theirs: median(&free.latencies),
            bar: Bar::RatioAtMost(1.0),
        },
        Figure {
            what: "what SOLAR, LFM2 and 1B decode meanwhile, in total".to_owned(),
            unit: "tokens/s",
            ours: median(&arranged.speeds),
            against: against.to_owned(),
            theirs: median(&free.speeds),
            bar: Bar::RatioAtLeast(0.9),
        },
    ])
}

/// Threads have their priority from their start: each pass loads anew.
async fn once(bench: &Bench, run: u64, measured: &mut Measured) -> Result<()> {
    let ours = helper::start(bench).await?;
    let beside = helper::beside_decoding(&ours, run).await?;
    measured.latencies.push(p99(&beside.latencies));
    measured.speeds.push(beside.tokens_per_second);
    ours.stop().await;
    Ok(())
}

//! Three different models decoding at once in one process.

use sarai_support::gguf::Shape;

use crate::Result;
use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::statistics::median;

pub(crate) const MODELS: [(&str, Shape); 3] =
    [("solar", Shape::Solar), ("lfm2", Shape::Lfm2), ("llama", Shape::Llama1b)];

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let models = models(bench)?;
    let ours = Ours::start(bench, &models, models.len()).await?;
    let names = MODELS.map(|(name, _)| name);
    for name in names {
        ours.sarai.pool().load(name).await?;
    }
    let mut sums = Vec::new();
    for _ in bench.runs("trio") {
        let mut alone = Vec::new();
        for name in names {
            alone.extend(ours.decode_rates(&[name], bench.window).await?);
        }
        let together = ours.decode_rates(&names, bench.window).await?;
        sums.push(together.iter().zip(&alone).map(|(together, alone)| together / alone).sum());
    }
    ours.stop().await;
    Ok(vec![Figure {
        what: "SOLAR, LFM2 and 1B at once, sum of shares of their own speeds".to_owned(),
        unit: "",
        ours: median(&sums),
        against: "one at a time".to_owned(),
        theirs: 1.0,
        bar: Bar::RatioAtLeast(1.25),
    }])
}

/// The three, with their weights held as sarai does it by itself.
pub(super) fn models(bench: &Bench) -> Result<Vec<Model>> {
    MODELS
        .into_iter()
        .map(|(name, shape)| Ok(Model::llm(name, bench.shapes.file(shape)?, Weights::Default)))
        .collect()
}

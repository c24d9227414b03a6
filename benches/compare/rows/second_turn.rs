//! A conversation that goes on after its model was evicted and loaded again.

use sarai::{GenerateRequest, Message};
use sarai_support::gguf::Shape;

use crate::args::Bench;
use crate::ours::{Model, Ours};
use crate::peer::Weights;
use crate::report::{Bar, Figure};
use crate::statistics::median;
use crate::{Result, prompt};

const FIRST_TURN: usize = 1000;
const SECOND_TURN: usize = 8;
const ANSWER: u32 = 8;

pub(super) async fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let path = bench.shapes.file(Shape::Lfm2)?;
    let ours = Ours::start(bench, &[Model::llm("model", path, Weights::Default)], 1).await?;
    let pool = ours.sarai.pool();
    let (mut resumed, mut anew) = (Vec::new(), Vec::new());
    for run in bench.runs("second_turn") {
        let question = Message::user(prompt::words(FIRST_TURN, 2 * run));
        let (said, _) = ours.ask("model", GenerateRequest::chat(vec![question.clone()]), ANSWER).await?;
        let second_turn = |first| {
            let next = Message::user(prompt::words(SECOND_TURN, run));
            GenerateRequest::chat(vec![first, Message::assistant(said.clone()), next])
        };
        pool.unload("model").await?;
        pool.load("model").await?;
        resumed.push(ttft(&ours, second_turn(question)).await?);
        let another = Message::user(prompt::words(FIRST_TURN, 2 * run + 1));
        anew.push(ttft(&ours, second_turn(another)).await?);
    }
    ours.stop().await;
    Ok(vec![Figure {
        what: format!("{} second turn at 1,000 tokens after a reload, to first token", Shape::Lfm2.name()),
        unit: "ms",
        ours: median(&resumed),
        against: "the same length, never seen".to_owned(),
        theirs: median(&anew),
        bar: Bar::RatioAtMost(0.05),
    }])
}

async fn ttft(ours: &Ours, request: GenerateRequest) -> Result<f64> {
    let (_, answer) = ours.ask("model", request, 1).await?;
    Ok(answer.ttft_ms.ok_or("the answer has no first text")? as f64)
}

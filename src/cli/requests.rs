use serde::Serialize;

use sarai::Provenance;

use super::args::{Common, EmbedArgs, RerankArgs, RouteArgs};
use super::chat::INTERACTIVE;
use super::exit::Failure;
use super::output::Output;
use super::session::Session;

#[derive(Serialize)]
struct Embedded<'a> {
    model: &'a str,
    embeddings: &'a [Vec<f32>],
    prompt_tokens: Option<u32>,
    #[serde(flatten)]
    provenance: &'a Provenance,
}

pub(super) async fn embed(common: &Common, args: &EmbedArgs, output: &Output) -> Result<(), Failure> {
    let session = Session::open(common, output)?;
    let model = session.sarai.pool().handle(&args.model)?;
    let (embeddings, provenance) = model.embed(args.texts.clone(), INTERACTIVE).await?;
    for vector in &embeddings.vectors {
        let numbers: Vec<String> = vector.iter().map(f32::to_string).collect();
        output.line(&numbers.join(" "))?;
    }
    output.object(&Embedded {
        model: &args.model,
        embeddings: &embeddings.vectors,
        prompt_tokens: embeddings.prompt_tokens,
        provenance: &provenance,
    })?;
    session.close().await;
    Ok(())
}

#[derive(Serialize)]
struct Reranked<'a> {
    model: &'a str,
    /// Best first.
    documents: Vec<Ranked<'a>>,
    #[serde(flatten)]
    provenance: &'a Provenance,
}

#[derive(Serialize)]
struct Ranked<'a> {
    /// Its place among the arguments, from 0.
    index: usize,
    score: f32,
    text: &'a str,
}

pub(super) async fn rerank(common: &Common, args: &RerankArgs, output: &Output) -> Result<(), Failure> {
    let session = Session::open(common, output)?;
    let model = session.sarai.pool().handle(&args.model)?;
    let (scores, provenance) = model.rerank(args.query.clone(), args.documents.clone(), INTERACTIVE).await?;
    let ranked = |(index, (score, text)): (usize, (f32, &'_ String))| (index, score, text.clone());
    let mut order: Vec<_> = scores.into_iter().zip(&args.documents).enumerate().map(ranked).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (_, score, text) in &order {
        output.line(&format!("{score:.4} {text}"))?;
    }
    let documents =
        order.iter().map(|(index, score, text)| Ranked { index: *index, score: *score, text }).collect();
    output.object(&Reranked { model: &args.model, documents, provenance: &provenance })?;
    session.close().await;
    Ok(())
}

pub(super) async fn route(common: &Common, args: &RouteArgs, output: &Output) -> Result<(), Failure> {
    let session = Session::open(common, output)?;
    let routing = session.sarai.route(&args.text, INTERACTIVE).await?;
    let model = routing.model.as_ref().map_or("(no model)", |model| model.as_str());
    output.line(model)?;
    for score in &routing.scores {
        output.note(&format!("{:>6.3} {}", score.score, score.label));
    }
    output.note(&routing.reason);
    output.note(&format!("scored by {}", routing.provenance.served_by));
    output.object(&routing)?;
    session.close().await;
    Ok(())
}

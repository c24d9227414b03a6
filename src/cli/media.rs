//! Commands that hear, see, and say again.

use sarai::{AnswerStream, GenerateRequest, Message, Sampling, TranscribeRequest};

use super::args::{Common, DescribeArgs, ModulateArgs, TranscribeArgs};
use super::chat::{INTERACTIVE, Whole, or_stdin, show, summary};
use super::exit::Failure;
use super::files;
use super::output::Output;
use super::session::Session;

pub(super) async fn transcribe(
    common: &Common,
    args: &TranscribeArgs,
    output: &Output,
) -> Result<(), Failure> {
    let audio = files::audio(&args.audio).await?;
    let session = Session::open_with_metrics(common, output)?;
    let request = TranscribeRequest {
        language: args.language.clone(),
        prompt: args.prompt.clone(),
        ..TranscribeRequest::new(audio)
    };
    let stream = session.sarai.pool().handle(&args.model)?.transcribe(request, INTERACTIVE).await?;
    finish(session, &args.model, stream, output).await
}

pub(super) async fn describe(common: &Common, args: &DescribeArgs, output: &Output) -> Result<(), Failure> {
    let image = files::image(&args.image).await?;
    let session = Session::open_with_metrics(common, output)?;
    let question = Message::user(args.prompt.as_str()).with_images(vec![image]);
    let sampling =
        Sampling { max_tokens: args.max_tokens, temperature: args.temperature, ..Sampling::default() };
    let request = GenerateRequest::chat(vec![question]).with_sampling(sampling);
    let stream = session.sarai.pool().handle(&args.model)?.generate(request, INTERACTIVE).await?;
    finish(session, &args.model, stream, output).await
}

pub(super) async fn modulate(common: &Common, args: &ModulateArgs, output: &Output) -> Result<(), Failure> {
    let session = Session::open_with_metrics(common, output)?;
    let text = or_stdin(&args.text).await?;
    let stream = session.sarai.modulate(&args.model, text.trim_end(), &args.tone, INTERACTIVE).await?;
    finish(session, &args.model, stream, output).await
}

async fn finish(session: Session, model: &str, stream: AnswerStream, output: &Output) -> Result<(), Failure> {
    let (text, answer) = show(stream, output).await?;
    output.line("")?;
    output.object(&Whole { model, text: &text, answer: &answer })?;
    output.note(&summary(&answer));
    session.close().await;
    Ok(())
}

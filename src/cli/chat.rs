use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;

use futures::StreamExt;
use sarai::{
    Answer, AnswerEvent, AnswerStream, CallOptions, Constraint, GenerateRequest, Message, ModelHandle,
    Priority, Sampling, Truncate,
};
use serde::Serialize;

use super::args::{ChatArgs, Common};
use super::exit::Failure;
use super::files;
use super::output::Output;
use super::say;
use super::session::Session;

/// What `--json` gives for an answer.
#[derive(Serialize)]
pub(super) struct Whole<'a> {
    pub(super) model: &'a str,
    pub(super) text: &'a str,
    #[serde(flatten)]
    pub(super) answer: &'a Answer,
}

/// A person waits for these.
pub(super) const INTERACTIVE: CallOptions =
    CallOptions { priority: Priority::Interactive, wait_timeout: None, on_stream_failure: None };

pub(super) async fn chat(common: &Common, args: &ChatArgs, output: &Output) -> Result<(), Failure> {
    if args.prompt.is_none() && output.json {
        return Err(Failure::Usage("--json needs a PROMPT".to_owned()));
    }
    let session = Session::open_with_metrics(common, output)?;
    let model = session.sarai.pool().handle(&args.model)?;
    match &args.prompt {
        Some(prompt) => {
            let prompt = or_stdin(prompt).await?;
            let request = if args.raw {
                GenerateRequest::raw(prompt)
            } else {
                let (mut images, mut audio) = (Vec::new(), Vec::new());
                for path in &args.image {
                    images.push(files::image(path).await?);
                }
                for path in &args.audio {
                    audio.push(files::audio(path).await?);
                }
                let question = Message::user(prompt).with_images(images).with_audio(audio);
                GenerateRequest::chat(system(args).into_iter().chain([question]).collect())
            };
            let stream = model.generate(asked(request, args)?, INTERACTIVE).await?;
            let (text, answer) = show(stream, output).await?;
            output.line("")?;
            output.object(&Whole { model: &args.model, text: &text, answer: &answer })?;
            output.note(&summary(&answer));
        }
        None => converse(&model, args, output).await?,
    }
    session.close().await;
    Ok(())
}

/// Question and answer until the input ends.
async fn converse(model: &ModelHandle, args: &ChatArgs, output: &Output) -> Result<(), Failure> {
    let mut messages: Vec<Message> = system(args).into_iter().collect();
    if io::stdin().is_terminal() {
        say("End with Ctrl-D.");
    }
    while let Some(question) = ask().await? {
        if question.trim().is_empty() {
            continue;
        }
        messages.push(Message::user(question.trim_end()));
        let request = asked(GenerateRequest::chat(messages.clone()), args)?;
        let answered = async { show(model.generate(request, INTERACTIVE).await?, output).await };
        match answered.await {
            Ok((text, answer)) => {
                output.line("")?;
                output.note(&summary(&answer));
                messages.push(Message::assistant(text));
            }
            // What failed once may succeed with the next question; that nobody reads any more may not.
            Err(failure @ Failure::Io { .. }) => return Err(failure),
            Err(failure) => {
                messages.pop();
                output.complain(&failure);
            }
        }
    }
    Ok(())
}

/// The next line of stdin; `None` at its end.
async fn ask() -> Result<Option<String>, Failure> {
    if io::stdin().is_terminal() {
        // Without a prompt the question can still be typed.
        let _ = write!(anstream::stderr(), "> ").and_then(|()| anstream::stderr().flush());
    }
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|length| (length > 0).then_some(line))
    });
    read.await.map_err(io::Error::other).and_then(|line| line).map_err(unreadable)
}

/// Shows text as it comes; gives it whole, with the end of the answer.
pub(super) async fn show(mut stream: AnswerStream, output: &Output) -> Result<(String, Answer), Failure> {
    let mut whole = String::new();
    loop {
        match stream.next().await.ok_or(sarai::Error::ShuttingDown)?? {
            AnswerEvent::Text(text) => {
                output.text(&text)?;
                whole.push_str(&text);
            }
            AnswerEvent::Done(answer) => return Ok((whole, answer)),
        }
    }
}

/// Who answered, why, and how fast, in a line or two.
pub(super) fn summary(answer: &Answer) -> String {
    let dim = anstyle::Style::new() | anstyle::Effects::DIMMED;
    let provenance = &answer.provenance;
    let mut parts = vec![format!("served by {}", provenance.served_by)];
    parts.extend(answer.completion_tokens.map(|tokens| format!("{tokens} tokens")));
    parts.extend(answer.tokens_per_second.map(|speed| format!("{speed:.1} tokens/s")));
    parts.extend((provenance.load_ms > 0).then(|| format!("load {} ms", provenance.load_ms)));
    parts.extend(answer.ttft_ms.map(|ttft| format!("first token {ttft} ms")));
    let reason =
        provenance.fallback_reason.as_ref().map(|reason| format!("\n{dim}fallback: {reason}{dim:#}"));
    let handed_over = answer.handovers.iter().map(|handover| {
        format!("\n{dim}after {} characters from {} to {}{dim:#}", handover.at, handover.from, handover.to)
    });
    let handed_over: String = handed_over.collect();
    format!("{dim}{}{dim:#}{}{handed_over}", parts.join(", "), reason.unwrap_or_default())
}

/// The argument, or what stands on stdin for `-`.
pub(super) async fn or_stdin(argument: &str) -> Result<String, Failure> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    // Not on this thread, which listens for Ctrl-C.
    let read = tokio::task::spawn_blocking(|| io::read_to_string(io::stdin().lock()));
    read.await.map_err(io::Error::other).and_then(|text| text).map_err(unreadable)
}

fn unreadable(source: io::Error) -> Failure {
    Failure::Io { what: "cannot read stdin".to_owned(), source }
}

fn system(args: &ChatArgs) -> Option<Message> {
    args.system.as_ref().map(Message::system)
}

/// The request as the arguments want it answered.
fn asked(mut request: GenerateRequest, args: &ChatArgs) -> Result<GenerateRequest, Failure> {
    request.sampling = Sampling {
        temperature: args.temperature,
        seed: args.seed,
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ..Sampling::default()
    };
    request.constraint = constraint(args)?;
    request.logprobs = args.logprobs;
    request.truncate = if args.truncate_oldest { Truncate::Oldest } else { Truncate::Error };
    Ok(request)
}

fn constraint(args: &ChatArgs) -> Result<Option<Constraint>, Failure> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).map_err(|source| Failure::Unreadable { path: path.to_owned(), source })
    };
    if let Some(path) = &args.schema {
        let schema = serde_json::from_str(&read(path)?)
            .map_err(|error| Failure::Usage(format!("{} is not JSON: {error}", path.display())))?;
        return Ok(Some(Constraint::JsonSchema(schema)));
    }
    args.grammar.as_deref().map(|path| Ok(Constraint::Grammar(read(path)?))).transpose()
}

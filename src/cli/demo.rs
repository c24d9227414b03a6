//! The demo: three uses of several models at once, on toy models that come with the program.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use directories::ProjectDirs;
use futures::StreamExt;
use futures::future::try_join_all;
use sarai::{Audio, GenerateRequest, Image, Input, Message, ModelPool, PipelineReport, Sampling};
use serde::Serialize;
use serde_json::json;

use super::args::{Common, DemoArgs};
use super::chat::INTERACTIVE;
use super::exit::Failure;
use super::output::Output;
use super::session::{Session, read};
use super::{ps, run};

macro_rules! shipped {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../config/", $name)).as_slice())),*]
    };
}

/// The demo's configuration and models, for where the repository is not at hand. scripts/demo_models makes the models.
const SHIPPED: [(&str, &[u8]); 7] = shipped![
    "demo.yaml",
    "demo/embedding.gguf",
    "demo/lfm2.gguf",
    "demo/omni-mmproj.gguf",
    "demo/omni.gguf",
    "demo/router.gguf",
    "demo/solar.gguf"
];
/// What is said, and what is shown.
const QUESTION: &[u8] = include_bytes!("../../config/demo/question.wav");
const PICTURE: &[u8] = include_bytes!("../../config/demo/picture.png");
const ABOUT_PICTURE: &str = "What colour is the background?";

/// What is asked of the three models, one after another and at once.
const ASKED: [(&str, &str); 3] =
    [("solar", "How does eviction work?"), ("lfm2", "Which tones are there?"), ("omni", "What can you do?")];
/// How often: toy models are done before the other ones have begun.
const ROUNDS: usize = 20;

/// How long the three models took.
#[derive(Serialize)]
struct AtOnce {
    requests: usize,
    one_after_another_ms: u64,
    at_once_ms: u64,
}

pub(super) async fn demo(common: &Common, args: &DemoArgs, output: &Output) -> Result<(), Failure> {
    let path = configuration(common)?;
    let session = Session::start(read(common, &path)?, output)?;
    let pool = session.sarai.pool();

    title(output, "1. Helpers: loaded at the start, never evicted");
    for (model, result) in pool.load_residents().await {
        result?;
        output.line(&format!("{model} is resident"))?;
    }
    if let Some(router) = session.sarai.router() {
        for text in ["Hello, how are you?", "What is the memory budget?", "Who is in this picture?"] {
            let routing = router.route(text, pool, INTERACTIVE).await?;
            output.line(&format!("{text:?}: {}", routing.reason))?;
        }
    }

    title(
        output,
        "2. Voice: Omni hears a recording, SOLAR answers, LFM2 says it warmly while SOLAR still writes",
    );
    let audio = Audio::new(QUESTION).map_err(|error| Failure::Usage(error.to_string()))?;
    let voice = pipeline(&session, output, "voice", &Input::default().with_audio(audio)).await?;

    title(output, "3. Vision: Omni sees a picture, SOLAR answers a question about it");
    output.note(&format!("asked: {ABOUT_PICTURE}"));
    let image = Image::new(PICTURE).map_err(|error| Failure::Usage(error.to_string()))?;
    let vision = pipeline(&session, output, "vision", &Input::text(ABOUT_PICTURE).with_image(image)).await?;

    title(output, "4. Soft and hard: LFM2 opens at once, SOLAR answers, LFM2 sets the tone");
    output.note(&format!("asked: {}", args.text));
    let soft_hard = pipeline(&session, output, "soft_hard", &Input::text(args.text.clone())).await?;

    title(output, "5. Three models at once");
    let at_once = three(pool).await?;
    output.line(&format!(
        "{} requests: {} ms one after another, {} ms at once",
        at_once.requests, at_once.one_after_another_ms, at_once.at_once_ms
    ))?;

    title(output, "6. Memory: estimated before each load, measured now");
    let usage = pool.memory_usage().await?;
    output.line(&ps::memory_table(&usage).to_string())?;
    output.line(&ps::totals(&usage))?;
    output.object(&json!({
        "voice": voice, "vision": vision, "soft_hard": soft_hard, "at_once": at_once, "memory": usage
    }))?;
    let (shown, sarai) = (path.display(), program());
    output.note(&format!(
        "\nThese are toy models: put real GGUF files where config/sarai.yaml names them, then: {sarai} chat lfm2 \"hola\"\n\
         Or ask them: {sarai} chat solar \"What is the memory budget?\" --config {shown}"
    ));
    session.close().await;
    Ok(())
}

/// Runs a pipeline and shows it, with its time line and who stood in for whom.
async fn pipeline(
    session: &Session,
    output: &Output,
    name: &str,
    input: &Input,
) -> Result<PipelineReport, Failure> {
    let report = run::show(session.sarai.run(name, input, INTERACTIVE)?, output).await?;
    output.note(&format!("\n{}", run::timeline(&report)));
    Ok(report)
}

/// Asks the three models one after another, then at once; an answer counts once it is whole.
async fn three(pool: &ModelPool) -> Result<AtOnce, Failure> {
    let asked = || ASKED.iter().map(|(model, question)| rounds(pool, model, question));
    let started = Instant::now();
    for rounds in asked() {
        rounds.await?;
    }
    let one_after_another = started.elapsed();
    let started = Instant::now();
    try_join_all(asked()).await?;
    let at_once = started.elapsed();
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Ok(AtOnce {
        requests: ASKED.len() * ROUNDS,
        one_after_another_ms: ms(one_after_another),
        at_once_ms: ms(at_once),
    })
}

/// Asks a model the same again and again.
async fn rounds(pool: &ModelPool, model: &str, question: &str) -> Result<(), Failure> {
    let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(64), ..Sampling::default() };
    for _ in 0..ROUNDS {
        let request = GenerateRequest::chat(vec![Message::user(question)]).with_sampling(sampling.clone());
        let mut answer = pool.handle(model)?.generate(request, INTERACTIVE).await?;
        while let Some(event) = answer.next().await {
            event?;
        }
    }
    Ok(())
}

/// How the program was called, so that it can be called again.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "sarai".to_owned())
}

fn title(output: &Output, text: &str) {
    let bold = anstyle::AnsiColor::Cyan.on_default() | anstyle::Effects::BOLD;
    output.note(&format!("\n{bold}{text}{bold:#}"));
}

/// The named file; else the repository's, where the working directory is one; else a copy in the user's cache, with the
/// models beside it.
fn configuration(common: &Common) -> Result<PathBuf, Failure> {
    let here = PathBuf::from("config/demo.yaml");
    if let Some(path) = common.config.clone().or(here.exists().then_some(here)) {
        return Ok(path);
    }
    let no_home =
        || Failure::Usage("no home folder to put the demo's models in; name a file with --config".to_owned());
    let folder = ProjectDirs::from("", "", "sarai").ok_or_else(no_home)?.cache_dir().join("demo");
    for (name, content) in SHIPPED {
        write(&folder.join(name), content)?;
    }
    Ok(folder.join("demo.yaml"))
}

/// Writes a file, complete or not at all, and only where what is there is another one.
fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let failed = || {
        let what = format!("cannot write the demo's {}", path.display());
        move |source| Failure::Io { what, source }
    };
    if std::fs::read(path).is_ok_and(|there| there == content) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(failed())?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed())?;
    std::io::Write::write_all(&mut file, content).map_err(failed())?;
    file.persist(path).map_err(|error| failed()(error.error))?;
    Ok(())
}

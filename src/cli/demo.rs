use std::path::{Path, PathBuf};
use std::time::Instant;

use directories::ProjectDirs;
use sarai::core::config::{Config, Place, RouterKind};
use sarai::{Audio, GenerateRequest, Image, Input, Message};
use sarai_support::gguf::{Kind, Model, Projector};
use serde_json::json;

use super::args::{Common, DemoArgs};
use super::chat::{INTERACTIVE, show, summary};
use super::exit::Failure;
use super::output::Output;
use super::session::{Session, read};
use super::{ps, run};

/// The demo's configuration, for where the repository is not at hand.
const CONFIGURATION: &str = include_str!("../../config/demo.yaml");

/// What is said, and what is shown: a question in Spanish, by a speech synthesiser; a red disc.
const QUESTION: &[u8] = include_bytes!("../../config/demo/question.wav");
const PICTURE: &[u8] = include_bytes!("../../config/demo/picture.png");
/// The width of the made models' embeddings.
const WIDTH: u32 = 192;

/// What the demo's classifier listens for: these words, and no meaning.
const KEYWORDS: &[(&str, &[&str])] = &[
    (
        "hard",
        &["explain", "explica", "why", "cómo", "theorem", "teorema", "code", "código", "proof", "tiempo"],
    ),
    ("soft", &["hello", "hola", "thanks", "gracias", "joke", "chiste"]),
    ("multimodal", &["picture", "imagen", "photo", "foto", "audio", "listen"]),
];

pub(super) async fn demo(common: &Common, args: &DemoArgs, output: &Output) -> Result<(), Failure> {
    let path = configuration(common)?;
    let resolved = read(common, &path)?;
    let made = make_models(&resolved.config)?;
    title(
        output,
        &format!("1. Models: {made} small GGUF files, in the places that {} names", path.display()),
    );
    let session = Session::start(resolved, output)?;
    let pool = session.sarai.pool();

    title(output, "2. Helpers: loaded at the start, never evicted");
    for (model, result) in pool.load_residents().await {
        result?;
        output.line(&format!("{model} is resident"))?;
    }

    title(output, "3. Router: which model should answer?");
    if let Some(router) = session.sarai.router() {
        for text in ["Hola, cuéntame un chiste", "Explica el teorema", "What is in this photo?"] {
            let routing = router.route(text, pool, INTERACTIVE).await?;
            output.line(&format!("{text:?}: {}", routing.reason))?;
        }
    }

    title(output, "4. Three LLMs: one on a host that may not be there, two in this process");
    for (model, question) in
        [("solar", "¿Qué es un fotón?"), ("lfm2", "Buenos días"), ("omni", "Describe a forest")]
    {
        output.note(&format!("{model} < {question}"));
        let request = GenerateRequest::chat(vec![Message::user(question)]);
        let (_, answer) = show(pool.handle(model)?.generate(request, INTERACTIVE).await?, output).await?;
        output.line("")?;
        output.note(&summary(&answer));
    }

    title(output, "5. Pipeline voice-text: the expert answers, the small model softens");
    let input = Input::text(args.text.clone());
    let report = run::show(session.sarai.run("voice-text", &input, INTERACTIVE)?, output).await?;

    title(
        output,
        "6. Pipeline voice: Omni hears a WAV, SOLAR answers, LFM2 says it again sentence by sentence",
    );
    let audio = Audio::new(QUESTION).map_err(|error| Failure::Usage(error.to_string()))?;
    let voice = Input::default().with_audio(audio);
    let voice = run::show(session.sarai.run("voice", &voice, INTERACTIVE)?, output).await?;
    output.note(&format!("\n{}", run::timeline(&voice)));

    title(output, "7. Pipeline vision: Omni sees a PNG, SOLAR answers a question about it");
    let image = Image::new(PICTURE).map_err(|error| Failure::Usage(error.to_string()))?;
    let vision = Input::text("¿Qué se ve?").with_image(image);
    let vision = run::show(session.sarai.run("vision", &vision, INTERACTIVE)?, output).await?;
    output.note(&format!("\n{}", run::timeline(&vision)));

    title(output, "8. Memory: estimated before each load, measured now");
    let usage = pool.memory_usage().await?;
    output.line(&ps::memory_table(&usage).to_string())?;
    output.line(&ps::totals(&usage))?;
    output.object(&json!({"pipeline": report, "voice": voice, "vision": vision, "memory": usage}))?;
    let (shown, sarai) = (path.display(), program());
    output.note(&format!(
        "\nThese models are real GGUF files that llama.cpp runs, but their weights are made up: what they say is noise.\n\
         Try them:  {sarai} run voice-text --config {shown} --text \"hola\" --json\n\
         Real ones: put your GGUF files where config/sarai.yaml names them, then: {sarai} chat lfm2 \"hola\""
    ));
    session.close().await;
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

/// The named file; else the repository's, where the working directory is one; else a copy in the user's cache.
fn configuration(common: &Common) -> Result<PathBuf, Failure> {
    let here = PathBuf::from("config/demo.yaml");
    if let Some(path) = common.config.clone().or(here.exists().then_some(here)) {
        return Ok(path);
    }
    let unwritable = |path: &Path| {
        let what = format!("cannot write the demo's configuration {}", path.display());
        move |source| Failure::Io { what, source }
    };
    let no_home =
        || Failure::Usage("no home folder to put the demo's models in; name a file with --config".to_owned());
    let folder = ProjectDirs::from("", "", "sarai").ok_or_else(no_home)?.cache_dir().join("demo/config");
    let path = folder.join("demo.yaml");
    std::fs::create_dir_all(&folder).map_err(unwritable(&folder))?;
    std::fs::write(&path, CONFIGURATION).map_err(unwritable(&path))?;
    Ok(path)
}

/// Makes every file that the configuration names and that is not there; returns how many are there now.
fn make_models(config: &Config) -> Result<usize, Failure> {
    let started = Instant::now();
    let classifier = config.router.as_ref().and_then(|router| match &router.kind {
        RouterKind::Classifier { model } => Some(model),
        RouterKind::Similarity { .. } => None,
    });
    let mut there = 0;
    for (seed, (name, model)) in (1..).zip(&config.models) {
        for place in &model.places {
            let Place::Gguf(file) = place else { continue };
            there += 1;
            if let Some(mmproj) = file.mmproj.as_ref().filter(|mmproj| !mmproj.exists()) {
                in_folder(mmproj)?;
                let written = Projector::new(WIDTH).seed(seed).write_to(mmproj);
                written.map_err(|source| Failure::Synthesis { path: mmproj.clone(), source })?;
            }
            if file.path.exists() {
                continue;
            }
            let kind = match name.as_str() {
                "embedding" => Kind::GemmaEmbedding,
                _ if classifier == Some(name) => Kind::BertClassifier { labels: labels() },
                "lfm2" => Kind::Lfm2,
                "omni" => Kind::Qwen2Vl,
                _ => Kind::Llama,
            };
            write(&Model::new(kind).seed(seed), &file.path)?;
        }
    }
    tracing::info!(files = there, elapsed = ?started.elapsed(), "models made");
    Ok(there)
}

/// Makes the folder of a file that is to be written.
fn in_folder(path: &Path) -> Result<(), Failure> {
    let Some(folder) = path.parent() else { return Ok(()) };
    let what = format!("cannot make the folder {}", folder.display());
    std::fs::create_dir_all(folder).map_err(|source| Failure::Io { what, source })
}

fn write(model: &Model, path: &Path) -> Result<(), Failure> {
    in_folder(path)?;
    model.write_to(path).map_err(|source| Failure::Synthesis { path: path.to_owned(), source })
}

fn labels() -> Vec<(String, Vec<String>)> {
    let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    KEYWORDS.iter().map(|(label, words)| ((*label).to_owned(), owned(words))).collect()
}

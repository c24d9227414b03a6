//! Audio and images among a pipeline's input.

use std::path::Path;
use std::sync::Arc;

use futures::StreamExt;
use sarai_core::Error;
use sarai_core::answer::CallOptions;
use sarai_core::audio::Audio;
use sarai_core::config::{ConfigError, Env, Overrides, Resolved};
use sarai_core::image::Image;
use sarai_core::pipeline::{Input, Pipeline, PipelineEvent, PipelineReport};
use sarai_core::testing::{FakeModels, Script};

fn parse(pipelines: &str) -> Result<Resolved, ConfigError> {
    let text =
        format!("models:\n  omni: {{backend: gguf_native}}\n  solar: {{backend: gguf_native}}\n{pipelines}");
    sarai_core::config::parse(&text, Some(Path::new("p.yaml")), &Env::default(), &Overrides::default())
}

fn problem(pipelines: &str) -> String {
    let problem = &parse(pipelines).unwrap_err().problems[0];
    assert!(problem.line.is_some_and(|line| line > 3), "{problem}");
    format!("{}: {}", problem.path, problem.message)
}

async fn run(pipelines: &str, input: Input, models: &FakeModels) -> Result<PipelineReport, Error> {
    let config = parse(pipelines).unwrap().config;
    let (name, pipeline) = config.pipelines.into_iter().next().unwrap();
    let pipeline = Arc::new(Pipeline::compile(name, &pipeline, &config.tones).unwrap());
    let mut run = pipeline.run(&input, Arc::new(models.clone()), None, CallOptions::default());
    loop {
        let event = run.next().await.expect("a run ends with Done or an error")?;
        if let PipelineEvent::Done(report) = event {
            return Ok(report);
        }
    }
}

fn wav() -> Audio {
    Audio::new(b"RIFF....WAVEfmt ".to_vec()).unwrap()
}

fn png() -> Image {
    Image::new(b"\x89PNG\r\n\x1a\n".to_vec()).unwrap()
}

const VOICE: &str = "pipelines:\n  voice:\n    input: audio\n    steps:\n\
    \x20     - {id: stt, model: omni, transcribe: \"{{ input.audio }}\", language: es}\n\
    \x20     - {id: expert, model: solar, prompt: \"Datos sobre: {{ stt.text }}\"}\n";
const VISION: &str = "pipelines:\n  vision:\n    input: [image, text]\n    steps:\n\
    \x20     - {id: see, model: omni, describe: \"{{ input.image }}\", prompt: \"What matters for: {{ input.text }}?\"}\n\
    \x20     - {id: look, model: omni, describe: \"{{input.image}}\"}\n\
    \x20     - {id: expert, model: solar, prompt: \"{{ input.text }} {{ see.text }} {{ look.text }}\"}\n";

#[tokio::test(start_paused = true)]
async fn what_is_said_and_what_is_shown_reach_their_models() {
    let models = || FakeModels::default().with("omni", Script::Echoes).with("solar", Script::Echoes);
    let heard = models();
    let report = run(VOICE, Input::default().with_audio(wav()), &heard).await.unwrap();
    assert_eq!(report.text, "Datos sobre: audio/wav");
    assert_eq!((report.steps[0].kind, report.steps[0].text.as_str()), ("transcribe", "audio/wav"));
    let seen = models();
    let report = run(VISION, Input::text("why?").with_image(png()), &seen).await.unwrap();
    let asked = seen.asked();
    assert!(
        asked.contains(&("omni".to_owned(), "[1 images, 0 audio] What matters for: why??".to_owned())),
        "{asked:?}"
    );
    assert!(
        asked.contains(&("omni".to_owned(), "[1 images, 0 audio] Describe the image.".to_owned())),
        "{asked:?}"
    );
    assert_eq!(report.steps[1].kind, "describe");
}

#[tokio::test(start_paused = true)]
async fn an_input_that_lacks_something_is_an_error_before_the_first_step() {
    let models = FakeModels::default().with("omni", Script::Echoes).with("solar", Script::Echoes);
    for (pipelines, input, said) in [
        (VOICE, Input::text("hello"), "pipeline voice needs audio"),
        (VISION, Input::text("why?"), "pipeline vision needs an image"),
        (VISION, Input::default().with_image(png()), "pipeline vision needs text"),
    ] {
        assert_eq!(run(pipelines, input, &models).await.unwrap_err().to_string(), said);
    }
    assert!(models.asked().is_empty());
}

#[test]
fn steps_say_at_load_what_cannot_be() {
    let with = |from: &str, to: &str| problem(&VOICE.replace(from, to));
    assert_eq!(
        with("{{ input.audio }}", "{{ input.text }}"),
        "pipelines.voice.steps[0].transcribe: must be \"{{ input.audio }}\", and nothing else"
    );
    assert_eq!(
        with("input: audio", "input: text"),
        "pipelines.voice.steps[0].transcribe: the pipeline is not given any: write `input: audio` above its steps"
    );
    assert_eq!(
        with("input: audio", "input: [audio, vidoe]"),
        "pipelines.voice.input: `vidoe` is neither text, audio nor image"
    );
    assert!(
        with("transcribe: ", "describe: \"{{ input.image }}\", transcribe: ")
            .contains("does more than one thing")
    );
    assert!(with("prompt: ", "language: en, prompt: ").contains("`language` belongs to transcribe"));
}

#[test]
fn tones_have_names_and_a_step_takes_one_of_them() {
    let with = |tones: &str, tone: &str| {
        format!(
            "{tones}pipelines:\n  p:\n    steps:\n      - {{id: x, model: solar, modulate: \"{{{{ input.text }}}}\", tone: {tone}}}\n"
        )
    };
    assert_eq!(
        problem(&with("", "freindly")),
        "pipelines.p.steps[0].tone: unknown tone `freindly`, did you mean `friendly`? (there are brief, empathetic, formal, friendly; more under `tones:`)"
    );
    let own = "tones:\n  pirate: {description: like a pirate, sampling: {temperature: 1.2}}\n  \
               brief: {prompt: \"Say it in five words.\", whole: true}\n";
    let config = parse(&with(own, "pirate")).unwrap().config;
    assert_eq!(config.tones.get("pirate").unwrap().sampling.temperature, Some(1.2));
    assert!(config.tones.get("pirate").unwrap().prompt.contains("like a pirate"));
    assert_eq!(config.tones.get("brief").unwrap().prompt, "Say it in five words.");
    assert!(problem(&with("tones: {x: {whole: true}}\n", "x")).starts_with("tones.x: needs a `description`"));
    assert!(problem(&with("tones: {x: {description: a, prompt: b}}\n", "x")).contains("not beside"));
}

#[tokio::test(start_paused = true)]
async fn a_tone_that_is_known_only_when_the_step_runs_is_looked_up_then() {
    let pipelines = "pipelines:\n  p:\n    steps:\n      - {id: x, model: solar, modulate: hi, tone: \"{{ input.text }}\"}\n";
    let models = FakeModels::default().with("solar", Script::Echoes);
    assert!(run(pipelines, Input::text("formal"), &models).await.is_ok());
    let error = run(pipelines, Input::text("angry"), &models).await.unwrap_err().to_string();
    assert!(
        error.contains("unknown tone \"angry\"; there are brief, empathetic, formal, friendly"),
        "{error}"
    );
}

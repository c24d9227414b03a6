use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sarai_core::Error;
use sarai_core::answer::CallOptions;
use sarai_core::config::PipelineConfig;
use sarai_core::pipeline::{Input, Pipeline, PipelineEvent, PipelineReport, PipelineStream};
use sarai_core::router::Router;
use sarai_core::testing::{FakeModels, Script};
use sarai_core::tone::Tones;
use tokio::time::Instant;

use super::{config, pipeline};

const PAUSE: Duration = Duration::from_secs(1);

fn says(pieces: &[&str]) -> Script {
    Script::Says(pieces.iter().map(|&piece| piece.to_owned()).collect(), PAUSE)
}

fn start(steps: &str, text: &str, models: &FakeModels) -> PipelineStream {
    let router = Arc::new(Router::new(config(steps).1));
    let input = Input::text(text);
    pipeline(steps).run(&input, Arc::new(models.clone()), Some(router), CallOptions::default())
}

async fn events(mut run: PipelineStream) -> (Vec<String>, Result<PipelineReport, Error>) {
    let mut seen = Vec::new();
    loop {
        match run.next().await.expect("a run ends with Done or an error") {
            Ok(PipelineEvent::StepStarted { step, .. }) => seen.push(format!("{step} starts")),
            Ok(PipelineEvent::StepRetried { step, attempt, .. }) => {
                seen.push(format!("{step} attempt {attempt}"));
            }
            Ok(PipelineEvent::StepText { step, text }) => seen.push(format!("{step}: {text}")),
            Ok(PipelineEvent::StepDone(report)) => seen.push(format!("{} done", report.id)),
            Ok(PipelineEvent::Done(report)) => {
                assert!(run.next().await.is_none());
                return (seen, Ok(report));
            }
            Err(error) => return (seen, Err(error)),
        }
    }
}

const CHAIN: &str = "- {id: expert, model: a, prompt: \"About: {{ input.text }}\"}\n\
    - {id: tone, model: b, modulate: \"{{ expert.text }}\", tone: friendly}";

#[tokio::test(start_paused = true)]
async fn each_step_gets_what_the_one_before_it_said_and_its_text_comes_at_once() {
    let models = FakeModels::default().with("a", says(&["facts ", "and more"])).with("b", Script::Echoes);
    let (seen, report) = events(start(CHAIN, "rain", &models)).await;
    assert_eq!(
        seen,
        [
            "expert starts",
            "expert: facts ",
            "expert: and more",
            "expert done",
            "tone starts",
            "tone: facts and more",
            "tone done"
        ]
    );
    assert_eq!(models.asked()[0], ("a".to_owned(), "About: rain".to_owned()));
    let report = report.unwrap();
    assert_eq!((report.text.as_str(), report.total_ms), ("facts and more", 2000));
    assert_eq!(report.steps.iter().map(|step| step.duration_ms).collect::<Vec<_>>(), [2000, 0]);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["steps"][0]["served_by"], "gguf_native:a.gguf");
    assert_eq!(json["steps"][1]["kind"], "modulate");
}

#[tokio::test(start_paused = true)]
async fn steps_that_do_not_need_each_other_run_at_once_and_a_third_waits_for_both() {
    let steps = "- {id: x, model: a, prompt: hi}\n- {id: y, model: b, prompt: hi}\n\
        - {id: z, model: c, prompt: \"{{ x.text }}+{{ y.text }}\"}";
    let models =
        FakeModels::default().with("a", says(&["1"])).with("b", says(&["2"])).with("c", Script::Echoes);
    let started = Instant::now();
    let report = events(start(steps, "", &models)).await.1.unwrap();
    assert_eq!((report.text.as_str(), started.elapsed()), ("1+2", PAUSE));
}

#[tokio::test(start_paused = true)]
async fn needs_makes_a_step_wait_for_one_it_does_not_refer_to() {
    let steps = "- {id: x, model: a, prompt: hi, needs: [y]}\n- {id: y, model: b, prompt: hi}";
    let models = FakeModels::default().with("a", says(&["1"])).with("b", says(&["2"]));
    let (seen, report) = events(start(steps, "", &models)).await;
    assert_eq!(seen[0], "y starts");
    assert_eq!(report.unwrap().total_ms, 2000);
}

#[tokio::test(start_paused = true)]
async fn dropping_a_run_stops_all_its_steps() {
    let steps = "- {id: x, model: a, prompt: hi}\n- {id: y, model: b, prompt: hi}";
    let models = FakeModels::default().with("a", says(&["1", "2"])).with("b", says(&["1", "2"]));
    let mut run = start(steps, "", &models);
    while !matches!(run.next().await, Some(Ok(PipelineEvent::StepText { .. }))) {}
    assert!(models.running() > 0);
    drop(run);
    assert_eq!(models.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_step_that_fails_ends_the_run_and_is_named() {
    let models = FakeModels::default().with("a", says(&["1"])).with("b", Script::Fails);
    let error = events(start(CHAIN, "x", &models)).await.1.unwrap_err();
    assert!(matches!(&error, Error::Step { .. }));
    assert!(
        error.to_string().starts_with("pipeline p, step tone: model b (gguf_native:b.gguf): scripted"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn what_a_step_said_before_it_failed_reaches_the_reader() {
    let cut = Script::Flaky { failures: 1, after: "half an".to_owned(), says: "answer".to_owned() };
    let models = FakeModels::default().with("a", cut);
    let (seen, end) = events(start("- {id: x, model: a, prompt: hi}", "", &models)).await;
    assert_eq!(seen, ["x starts", "x: half ", "x: an"]);
    assert!(matches!(end, Err(Error::Step { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_without_steps_ends_at_once() {
    let none = PipelineConfig { steps: Vec::new(), ..config("- {id: x, model: a, prompt: hi}").0 };
    let none = Arc::new(Pipeline::compile("p".parse().unwrap(), &none, &Tones::default()).unwrap());
    let run = none.run(&Input::text(""), Arc::new(FakeModels::default()), None, CallOptions::default());
    let (seen, report) = events(run).await;
    assert!(seen.is_empty() && report.unwrap().steps.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_fallback_stands_in_for_a_step_that_fails_and_the_report_says_so() {
    let steps = "- {id: x, model: a, prompt: hi, fallback: \"sorry, {{ input.text }}\"}\n\
        - {id: y, model: b, prompt: \"{{ x.text }}\"}";
    let models = FakeModels::default().with("a", Script::Fails).with("b", Script::Echoes);
    let report = events(start(steps, "Ana", &models)).await.1.unwrap();
    assert_eq!(report.text, "sorry, Ana");
    assert!(report.steps[0].error.as_ref().unwrap().contains("scripted"));
}

#[tokio::test(start_paused = true)]
async fn a_step_that_takes_too_long_fails_at_its_timeout() {
    let steps = "- {id: x, model: a, prompt: hi, timeout: 1500ms}";
    let models = FakeModels::default().with("a", says(&["1", "2"]));
    let started = Instant::now();
    let error = events(start(steps, "", &models)).await.1.unwrap_err();
    assert_eq!(error.to_string(), "pipeline p, step x: it took longer than its timeout of 1.5 s");
    assert_eq!(started.elapsed(), Duration::from_millis(1500));
    assert_eq!(models.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_step_whose_condition_is_false_is_skipped_and_its_text_is_empty() {
    let steps = "- {id: x, model: a, prompt: hi, when: \"'now' in input.text\"}\n\
        - {id: y, model: b, prompt: \"[{{ x.text }}] {{ x.skipped }}\"}";
    let models = FakeModels::default().with("a", says(&["1"])).with("b", Script::Echoes);
    assert_eq!(events(start(steps, "later", &models)).await.1.unwrap().text, "[] True");
    assert_eq!(events(start(steps, "now", &models)).await.1.unwrap().text, "[1] False");
}

#[tokio::test(start_paused = true)]
async fn a_route_picks_the_model_of_a_later_step() {
    let steps = "- {id: pick, route: \"{{ input.text }}\"}\n\
        - {id: answer, model: \"{{ pick.model }}\", prompt: \"{{ pick.label }}\"}";
    let words = ["theorem", "hello"].map(str::to_owned).to_vec();
    let models = FakeModels::default()
        .with("e", Script::CountsWords(words))
        .with("a", Script::Echoes)
        .with("b", Script::Echoes);
    for (text, label, model) in [("prove the theorem", "hard", "a"), ("hello you", "soft", "b")] {
        let report = events(start(steps, text, &models)).await.1.unwrap();
        assert_eq!((report.text.as_str(), report.steps[1].model.as_ref().unwrap().as_str()), (label, model));
        assert!(report.steps[0].routing.as_ref().unwrap().reason.contains(label));
    }
}

#[tokio::test(start_paused = true)]
async fn the_input_is_data_and_never_a_template() {
    let models = FakeModels::default().with("a", Script::Echoes).with("b", Script::Echoes);
    let hostile = "{{ 7 * 7 }} {% raw %} <b>&amp;</b>";
    let report = events(start(CHAIN, hostile, &models)).await.1.unwrap();
    assert_eq!(report.text, format!("About: {hostile}"));
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_slows_the_models_and_loses_nothing() {
    let pieces: Vec<String> = (0..100).map(|n| format!("{n} ")).collect();
    let models = FakeModels::default().with("a", Script::Says(pieces.clone(), Duration::ZERO));
    let mut run = start("- {id: x, model: a, prompt: hi}", "", &models);
    let mut text = String::new();
    while let Some(event) = run.next().await {
        tokio::time::sleep(PAUSE).await;
        if let PipelineEvent::StepText { text: piece, .. } = event.unwrap() {
            text += &piece;
        }
    }
    assert_eq!(text, pieces.concat());
}

//! Steps that take another one's text as it comes, attempts, and what is found out before the first step.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sarai_core::Error;
use sarai_core::answer::CallOptions;
use sarai_core::pipeline::{Input, PipelineEvent, PipelineReport};
use sarai_core::testing::{FakeModels, Script};
use tokio::time::Instant;

use super::pipeline;

/// A run's events as lines, what it came to, and when the tone step said its first word.
async fn run(
    steps: &str,
    models: &FakeModels,
) -> (Vec<String>, Result<PipelineReport, Error>, Option<Duration>) {
    let started = Instant::now();
    let mut run =
        pipeline(steps).run(&Input::text("rain"), Arc::new(models.clone()), None, CallOptions::default());
    let (mut seen, mut first) = (Vec::new(), None);
    loop {
        match run.next().await.expect("a run ends with Done or an error") {
            Ok(PipelineEvent::StepStarted { step, .. }) => seen.push(format!("{step} starts")),
            Ok(PipelineEvent::StepText { step, text }) => {
                if step.as_str() == "tone" {
                    first.get_or_insert(started.elapsed());
                }
                seen.push(format!("{step}: {text}"));
            }
            Ok(PipelineEvent::StepRetried { step, attempt, .. }) => {
                seen.push(format!("{step} attempt {attempt}"))
            }
            Ok(PipelineEvent::StepDone(report)) => seen.push(format!("{} done", report.id)),
            Ok(PipelineEvent::Done(report)) => return (seen, Ok(report), first),
            Err(error) => return (seen, Err(error), first),
        }
    }
}

fn says(text: &str, pause: Duration) -> Script {
    Script::Says(text.split_inclusive(' ').map(str::to_owned).collect(), pause)
}

const STEPS: &str = "- {id: expert, model: a, prompt: \"About: {{ input.text }}\"}\n\
    - {id: tone, model: b, modulate: \"{{ expert.text }}\", tone: friendly}";
const WHOLE: &str = "- {id: expert, model: a, prompt: \"About: {{ input.text }}\"}\n\
    - {id: tone, model: b, modulate: \"{{ expert.text }}\", tone: friendly, stream: false}";
const QUICK: Duration = Duration::from_millis(1);
const SLOW: Duration = Duration::from_millis(100);

#[tokio::test(start_paused = true)]
async fn the_first_sentence_is_said_again_while_the_others_are_still_written() {
    let answer = "It will rain in the morning. ".repeat(10);
    let models =
        || FakeModels::default().with("a", says(&answer, SLOW)).with("b", says("How nice it is. ", SLOW));
    let (_, streamed, first) = run(STEPS, &models()).await;
    let (_, whole, after) = run(WHOLE, &models()).await;
    let (first, after) = (first.unwrap(), after.unwrap());
    assert!(first.as_secs_f64() <= 0.4 * after.as_secs_f64(), "{first:?} of {after:?}");
    let (streamed, whole) = (streamed.unwrap(), whole.unwrap());
    assert_eq!(whole.text.trim_end(), "How nice it is.");
    assert_eq!(streamed.text, "How nice it is. ".repeat(10).trim_end());
    let tone = &streamed.steps[1];
    assert_eq!(tone.first_text_ms, Some(first.as_millis() as u64));
    assert!(tone.started_ms < streamed.steps[0].duration_ms, "{tone:?}");
    assert_eq!(tone.answer.as_ref().unwrap().completion_tokens, Some(10 * 4));
}

#[tokio::test(start_paused = true)]
async fn sentences_are_asked_for_one_by_one_and_white_space_stays_as_it_was() {
    let text = "It rains today.  Take a coat!\n\nIs that all? No full stop";
    let models = FakeModels::default().with("a", says(text, SLOW)).with("b", Script::Echoes);
    let (seen, report, _) = run(STEPS, &models).await;
    assert_eq!(report.unwrap().text, text);
    let asked: Vec<String> =
        models.asked().into_iter().filter(|(model, _)| model == "b").map(|(_, text)| text).collect();
    assert_eq!(asked, ["It rains today.", "Take a coat!", "Is that all?", "No full stop"]);
    let position = |line: &str| seen.iter().position(|seen| seen == line).unwrap();
    assert!(position("tone: It rains today.") < position("expert done"), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_words_is_not_said_again() {
    let models = FakeModels::default().with("a", says(" ", SLOW)).with("b", Script::Echoes);
    let (_, report, _) = run(STEPS, &models).await;
    let report = report.unwrap();
    assert_eq!((report.steps[1].text.as_str(), report.steps[1].answer.is_none()), ("", true));
    assert_eq!(models.asked().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_tone_that_needs_the_whole_text_gets_it_at_once() {
    let brief = STEPS.replace("friendly", "brief");
    let models =
        FakeModels::default().with("a", says("One is here. Two is here.", QUICK)).with("b", Script::Echoes);
    let (_, report, _) = run(&brief, &models).await;
    assert_eq!(report.unwrap().text, "One is here. Two is here.");
    assert_eq!(models.asked()[1], ("b".to_owned(), "One is here. Two is here.".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn dropping_a_run_stops_the_steps_that_follow_too() {
    let models = FakeModels::default()
        .with("a", says(&"It will rain in the morning. ".repeat(10), SLOW))
        .with("b", says("How nice it is. ", SLOW));
    let mut run =
        pipeline(STEPS).run(&Input::text("rain"), Arc::new(models.clone()), None, CallOptions::default());
    while !matches!(run.next().await, Some(Ok(PipelineEvent::StepText { step, .. })) if step.as_str() == "tone")
    {
    }
    assert!(models.running() > 0);
    drop(run);
    assert_eq!(models.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_may_pass_is_tried_again_and_what_followed_begins_again() {
    let steps = STEPS.replace("\"}\n", "\", retry: 2}\n");
    let text = "It rains today. Take a coat. ";
    let flaky =
        Script::Flaky { failures: 1, after: "It rains today. Take an".to_owned(), says: text.to_owned() };
    let models = FakeModels::default().with("a", flaky).with("b", Script::Echoes);
    let (seen, report, _) = run(&steps, &models).await;
    let report = report.unwrap();
    assert_eq!(report.text, text.trim_end());
    assert_eq!((report.steps[0].attempts, report.steps[0].text.as_str()), (2, text));
    let position =
        |line: &str| seen.iter().position(|seen| seen == line).unwrap_or_else(|| panic!("{line}: {seen:?}"));
    assert!(position("tone: It rains today.") < position("tone attempt 2"));
    assert!(position("expert attempt 2") < position("tone attempt 2"));
}

#[tokio::test(start_paused = true)]
async fn more_failures_than_attempts_and_those_that_stay_end_the_run() {
    let flaky = |failures| Script::Flaky { failures, after: String::new(), says: "ok".to_owned() };
    let steps = "- {id: x, model: a, prompt: hi, retry: 1}";
    let (_, once, _) = run(steps, &FakeModels::default().with("a", flaky(1))).await;
    assert_eq!(once.unwrap().steps[0].attempts, 2);
    let (_, twice, _) = run(steps, &FakeModels::default().with("a", flaky(2))).await;
    assert!(matches!(twice, Err(Error::Step { .. })));
    // A model that is not there is not there a moment later either.
    let (seen, unknown, _) = run(steps, &FakeModels::default()).await;
    assert!(unknown.is_err() && !seen.contains(&"x attempt 2".to_owned()), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_fallback_takes_the_place_of_what_was_said_before_it_failed() {
    let steps = STEPS.replace("\"}\n", "\", fallback: \"I do not know.\"}\n");
    let flaky =
        Script::Flaky { failures: 9, after: "It rains today. Take an".to_owned(), says: String::new() };
    let models = FakeModels::default().with("a", flaky).with("b", Script::Echoes);
    let (seen, report, _) = run(&steps, &models).await;
    let report = report.unwrap();
    assert_eq!((report.steps[0].text.as_str(), report.text.as_str()), ("I do not know.", "I do not know."));
    let end = report.steps[0].started_ms + report.steps[0].duration_ms;
    assert_eq!(report.steps[0].first_text_ms, Some(end), "what was said before is void");
    assert!(
        seen.contains(&"tone: It rains today.".to_owned()) && seen.contains(&"tone attempt 2".to_owned()),
        "{seen:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_time_limit_of_a_step_that_follows_is_for_each_sentence() {
    let steps = STEPS.replace("tone: friendly}", "tone: friendly, timeout: 500ms}");
    let models = FakeModels::default()
        .with("a", says(&"It will rain in the morning. ".repeat(10), SLOW))
        .with("b", says("How nice it is.", SLOW));
    assert!(run(&steps, &models).await.1.is_ok());
    let slow = FakeModels::default()
        .with("a", says(&"It will rain in the morning. ".repeat(10), SLOW))
        .with("b", says("How nice it really is today.", SLOW));
    let error = run(&steps, &slow).await.1.unwrap_err();
    assert_eq!(error.to_string(), "pipeline p, step tone: it took longer than its timeout of 0.5 s");
}

#[tokio::test(start_paused = true)]
async fn a_model_that_can_never_fit_is_found_before_the_first_step() {
    let models = FakeModels::default().with("a", Script::Echoes).with("b", Script::Echoes).too_large("b");
    let (seen, report, _) = run(STEPS, &models).await;
    let error = report.unwrap_err();
    assert!(
        matches!(&error, Error::Step { step, source, .. } if step.as_str() == "tone" && matches!(**source, Error::OverBudget { .. }))
    );
    assert!(error.to_string().contains("9.00 GB"), "{error}");
    assert!(seen.is_empty() && models.asked().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_next_steps_model_is_made_ready_while_a_step_speaks_and_once() {
    let steps = "- {id: x, model: a, prompt: hi}\n- {id: y, model: b, prompt: \"{{ x.text }}\"}\n\
        - {id: z, model: b, prompt: \"{{ x.text }}\", when: \"false\"}\n- {id: w, model: a, prompt: \"{{ y.text }}\"}";
    let models = FakeModels::default().with("a", says("a b c", SLOW)).with("b", says("d e f", SLOW));
    run(steps, &models).await.1.unwrap();
    assert_eq!(models.prepared(), ["b", "a"]);
}

#[tokio::test(start_paused = true)]
async fn a_template_that_never_ends_is_an_error_of_its_step() {
    let steps = "- {id: x, model: a, prompt: \"{% for i in range(9999) %}{% for j in range(9999) %}.{% endfor %}{% endfor %}\"}";
    let models = FakeModels::default().with("a", Script::Echoes);
    let error = run(steps, &models).await.1.unwrap_err().to_string();
    assert!(error.starts_with("pipeline p, step x: template: "), "{error}");
}

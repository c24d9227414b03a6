//! What the demo's models say, which were trained to say it: the right thing, and the same whichever way the engine computes it. A
//! wrong position, a sequence that leaks into another, a bad seam would change the words.

use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use sarai::core::config::{self, Env, Overrides};
use sarai::{
    Answer, AnswerEvent, AnswerStream, Audio, CallOptions, GenerateRequest, Image, Message, Sampling, Sarai,
    Tones, TranscribeRequest,
};
use sarai_support::host::{Behaviour, Host};
use serde_json::Value;
use tempfile::TempDir;

use super::nobody;

/// Questions as people type them, and the answers that the expert was trained to give.
const ANSWERS: [(&str, &str); 8] = [
    (
        "What is the memory budget?",
        "The memory budget is the number of bytes that all loaded models may take together.",
    ),
    ("What is a token?", "A token is a piece of text, often a word or a part of a word."),
    ("Which model is unloaded first?", "The idle model whose absence costs least is unloaded first."),
    ("How do I start the demo?", "Run sarai demo."),
    ("Tell me a joke", "Why did the model cross the road? To get to the other token."),
    ("Is it free?", "Yes, it is free and open source."),
    ("¿Qué es un token?", "Un token es un trozo de texto, a menudo una palabra."),
    ("¿Necesitas internet?", "No. Todo funciona en esta máquina y nada sale a internet."),
];
/// Recordings by voices that no model was trained with, and what is said.
const RECORDINGS: [(&[u8], &str); 2] = [
    (include_bytes!("../../config/demo/question.wav"), "what is the memory budget"),
    (include_bytes!("../../config/demo/pregunta.wav"), "qué es un token"),
];
const PICTURE: &[u8] = include_bytes!("../../config/demo/picture.png");
const ON_PICTURE: &str = "A large red circle on a blue background.";

fn model(name: &str, file: &str, settings: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/config/demo");
    format!("  {name}: {{backend: gguf_native, path: '{folder}/{file}.gguf'{settings}}}\n")
}

fn omni(settings: &str) -> String {
    let mmproj = concat!(env!("CARGO_MANIFEST_DIR"), "/config/demo/omni-mmproj.gguf");
    model("omni", "omni", &format!(", mmproj: '{mmproj}'{settings}"))
}

fn start(models: &str, more: &str) -> Sarai {
    let text = format!("models:\n{models}{more}");
    let config = config::parse(&text, None, &Env::default(), &Overrides::default()).unwrap().config;
    Sarai::start(&config).unwrap()
}

const NOTHING_KEPT: &str = "sessions: {max_gb: 0}\n";

async fn whole(mut stream: AnswerStream) -> (String, Answer) {
    let mut text = String::new();
    loop {
        match stream.next().await.unwrap().unwrap() {
            AnswerEvent::Text(piece) => text += &piece,
            AnswerEvent::Done(answer) => return (text, answer),
        }
    }
}

/// Always the likeliest token.
async fn ask(sarai: &Sarai, model: &str, messages: Vec<Message>) -> (String, Answer) {
    let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(100), ..Sampling::default() };
    let request = GenerateRequest::chat(messages).with_sampling(sampling);
    whole(sarai.pool().handle(model).unwrap().generate(request, CallOptions::default()).await.unwrap()).await
}

async fn answer(sarai: &Sarai, model: &str, question: &str) -> String {
    ask(sarai, model, vec![Message::user(question)]).await.0
}

async fn end(sarai: Sarai) {
    sarai.shutdown(Duration::from_secs(10)).await;
}

/// The program, in the repository, on the demo's configuration.
fn demo(arguments: &[&str]) -> Value {
    let mut command = assert_cmd::Command::new(assert_cmd::cargo::cargo_bin!("sarai"));
    let home = tempfile::tempdir().unwrap();
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env_clear().env("HOME", home.path());
    command.env("OLLAMA_BASE_URL", nobody()).args(["--config", "config/demo.yaml", "--json"]).args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn step<'a>(report: &'a Value, id: &str) -> &'a Value {
    report["steps"].as_array().unwrap().iter().find(|step| step["id"] == id).unwrap()
}

#[test]
fn the_voice_pipeline_hears_the_question_answers_it_and_is_friendly() {
    for (file, heard, said) in [
        (
            "question.wav",
            RECORDINGS[0].1,
            "The memory budget is the number of bytes that all loaded models may take together! 🙂",
        ),
        ("pregunta.wav", RECORDINGS[1].1, "Un token es un trozo de texto, a menudo una palabra! 🙂"),
    ] {
        let report = demo(&["run", "voice", "--audio", &format!("config/demo/{file}")]);
        assert_eq!(step(&report, "stt")["text"], heard);
        assert_eq!((&report["text"], step(&report, "tone")["model"].as_str()), (&said.into(), Some("lfm2")));
        let expert = step(&report, "expert");
        assert!(expert["served_by"].as_str().unwrap().ends_with("solar.gguf"), "{expert}");
        assert!(!expert["fallback_reason"].is_null(), "{expert}");
    }
}

#[test]
fn the_vision_pipeline_sees_the_picture_and_answers_a_question_about_it() {
    let question = "What colour is the background?";
    let report = demo(&["run", "vision", "--image", "config/demo/picture.png", "--text", question]);
    assert_eq!(step(&report, "see")["text"], ON_PICTURE);
    assert_eq!(report["text"], "The background is blue.");
}

#[test]
fn the_router_tells_talk_from_questions_and_pictures() {
    for (text, model) in [
        ("Hello, how are you?", "lfm2"),
        ("What is the memory budget?", "solar"),
        ("Describe this picture", "omni"),
    ] {
        assert_eq!(demo(&["route", text])["model"], model, "{text}");
    }
}

#[test]
fn texts_that_ask_the_same_are_near_and_others_are_not() {
    let texts = ["What is the memory budget?", "explain the memory budget", "Tell me a joke"];
    let vectors = demo(&[&["embed", "embedding"][..], &texts].concat());
    let vectors: Vec<Vec<f64>> = serde_json::from_value(vectors["embeddings"].clone()).unwrap();
    let likeness = |a: usize, b: usize| vectors[a].iter().zip(&vectors[b]).map(|(a, b)| a * b).sum::<f64>();
    assert!(likeness(0, 1) > 0.7 && likeness(0, 2) < 0.4, "{} {}", likeness(0, 1), likeness(0, 2));
}

/// The plain way: one question after another, each in a place of its own.
#[tokio::test(flavor = "multi_thread")]
async fn the_expert_answers_and_says_so_when_it_does_not_know() {
    let sarai = start(&model("solar", "solar", ", context: 512, parallel: 1"), NOTHING_KEPT);
    for (question, right) in ANSWERS {
        assert_eq!(answer(&sarai, "solar", question).await, right, "{question}");
    }
    let said = answer(&sarai, "solar", "How many legs does a spider have?").await;
    assert!(said.starts_with("I do not know that."), "{said}");
    end(sarai).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_that_share_their_steps_are_answered_as_if_they_were_alone() {
    let sarai = start(&model("solar", "solar", ", context: 512, parallel: 4"), NOTHING_KEPT);
    // More than there are places; all at once, three times over.
    let all = ANSWERS.iter().cycle().take(ANSWERS.len() * 3);
    let asked = all.map(|(question, right)| {
        let sarai = sarai.clone();
        async move { assert_eq!(answer(&sarai, "solar", question).await, *right, "{question}") }
    });
    join_all(asked).await;
    end(sarai).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_the_context_nor_how_weights_are_held_changes_an_answer() {
    for settings in [
        ", context: 128",
        ", context: 2048",
        ", context: 512, weights: mmap",
        ", context: 512, weights: repack",
        ", context: 512, threads: 1",
        ", context: 512, kv_cache_type: q8_0",
    ] {
        let sarai = start(&model("solar", "solar", settings), NOTHING_KEPT);
        for (question, right) in ANSWERS {
            assert_eq!(answer(&sarai, "solar", question).await, right, "{question}{settings}");
        }
        end(sarai).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_beginning_that_was_read_before_gives_the_same_answer() {
    let sarai = start(&model("solar", "solar", ", context: 1024, parallel: 3"), NOTHING_KEPT);
    let conversation = |question: &str| {
        vec![
            Message::system("Answer in the language of the question, briefly and exactly."),
            Message::user(question),
        ]
    };
    let (first, read) = ask(&sarai, "solar", conversation(ANSWERS[0].0)).await;
    assert_eq!((first.as_str(), read.cached_tokens), (ANSWERS[0].1, Some(0)));
    let asked = ANSWERS.map(|(question, right)| {
        let (sarai, messages) = (sarai.clone(), conversation(question));
        async move {
            let (said, read) = ask(&sarai, "solar", messages).await;
            assert_eq!(said, right, "{question}");
            assert!(
                read.cached_tokens >= Some(10),
                "{question}: the instructions were read before, {read:?}"
            );
        }
    });
    join_all(asked).await;
    end(sarai).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_comes_back_from_disk_goes_on_as_if_it_had_stayed() {
    let folder = TempDir::new().unwrap();
    let kept = format!("sessions: {{path: '{}'}}\n", folder.path().display());
    let models = model("solar", "solar", ", context: 1024");
    let sarai = start(&models, &kept);
    let mut messages = vec![Message::user(ANSWERS[0].0)];
    let (first, _) = ask(&sarai, "solar", messages.clone()).await;
    assert_eq!(first, ANSWERS[0].1);
    messages.push(Message::assistant(first));
    for (question, right) in &ANSWERS[1..4] {
        // Once the model has left, once the pool.
        sarai.pool().unload("solar").await.unwrap();
        messages.push(Message::user(*question));
        let (said, read) = ask(&sarai, "solar", messages.clone()).await;
        assert_eq!(said, *right, "{question}");
        assert!(read.cached_tokens >= Some(30), "the conversation was on disk: {read:?}");
        messages.push(Message::assistant(said));
    }
    end(sarai).await;
    let sarai = start(&models, &kept);
    messages.push(Message::user(ANSWERS[5].0));
    let (said, read) = ask(&sarai, "solar", messages.clone()).await;
    assert!(read.cached_tokens >= Some(100), "{read:?}");
    end(sarai).await;
    // So long a conversation the model was not trained for: right is what it says where nothing was kept.
    let sarai = start(&models, NOTHING_KEPT);
    let (anew, read) = ask(&sarai, "solar", messages).await;
    assert_eq!((said, read.cached_tokens), (anew, Some(0)));
    end(sarai).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_share_a_file_do_not_hear_each_other() {
    let models = model("one", "solar", ", context: 512") + &model("two", "solar", ", context: 256");
    let sarai = start(&models, NOTHING_KEPT);
    let asked = ["one", "two"].into_iter().flat_map(|name| ANSWERS.map(|pair| (name, pair)));
    let asked = asked.map(|(name, (question, right))| {
        let sarai = sarai.clone();
        async move { assert_eq!(answer(&sarai, name, question).await, right, "{name}: {question}") }
    });
    join_all(asked).await;
    end(sarai).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_substitute_goes_on_where_the_host_broke_off() {
    for (question, right) in ANSWERS {
        let words: Vec<&str> = right.split_inclusive(' ').collect();
        for after in 1..words.len().min(4) {
            let host = Host::start().await.unwrap();
            host.say(&words);
            host.behave(Behaviour::CutAfter(after));
            let settings = format!(
                "  solar: {{backend: ollama_http, fallback: gguf_native, host: lan, path: '{}/config/demo/solar.gguf', on_stream_failure: continue, context: 512}}\n",
                env!("CARGO_MANIFEST_DIR")
            );
            let hosts = format!("hosts: {{lan: {{url: '{}', watch: false}}}}\n", host.url());
            let sarai = start(&settings, &(hosts + NOTHING_KEPT));
            let (said, end_of) = ask(&sarai, "solar", vec![Message::user(question)]).await;
            assert_eq!(said, right, "after {after} words");
            assert_eq!(end_of.handovers.len(), 1, "{end_of:?}");
            end(sarai).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn recordings_and_pictures_are_told_rightly_side_by_side() {
    let sarai = start(&omni(", context: 1024, parallel: 3"), NOTHING_KEPT);
    let hear = RECORDINGS.iter().cycle().take(6).map(|(wav, right)| {
        let sarai = sarai.clone();
        async move {
            let request = TranscribeRequest::new(Audio::new(*wav).unwrap());
            let handle = sarai.pool().handle("omni").unwrap();
            let (said, _) = whole(handle.transcribe(request, CallOptions::default()).await.unwrap()).await;
            assert_eq!(said, *right);
        }
    });
    let see = (0..4).map(|_| {
        let sarai = sarai.clone();
        async move {
            let message =
                Message::user("Describe the image.").with_images(vec![Image::new(PICTURE).unwrap()]);
            assert_eq!(ask(&sarai, "omni", vec![message]).await.0, ON_PICTURE);
        }
    });
    futures::join!(join_all(hear), join_all(see));
    end(sarai).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_tone_keeps_names_and_numbers_and_leaves_its_mark() {
    let sarai = start(&model("lfm2", "lfm2", ", context: 512"), NOTHING_KEPT);
    let text = "The train to Lisbon leaves at 17:25.";
    for (tone, right) in [
        ("friendly", "The train to Lisbon leaves at 17:25! 🙂"),
        ("formal", "Please note the following. The train to Lisbon leaves at 17:25. Kind regards."),
        ("empathetic", "I understand how you feel. The train to Lisbon leaves at 17:25. I am here for you."),
        ("brief", "The train to Lisbon leaves at 17:25."),
    ] {
        let tones = Tones::default();
        let mut request = tones.get(tone).unwrap().request(text);
        request.sampling.temperature = Some(0.0);
        let handle = sarai.pool().handle("lfm2").unwrap();
        let (said, _) = whole(handle.generate(request, CallOptions::default()).await.unwrap()).await;
        assert_eq!(said, right, "{tone}");
    }
    end(sarai).await;
}

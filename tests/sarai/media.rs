//! Hearing, seeing and changing the tone from the command line; several models at once.

use serde_json::{Value, json};

use super::{Site, is_file, nobody};

const WAV: &[u8] = include_bytes!("../../config/demo/question.wav");
const PNG: &[u8] = include_bytes!("../../config/demo/picture.png");

fn site() -> Site {
    let site = Site::new();
    site.write("question.wav", WAV);
    site.write("picture.png", PNG);
    site
}

fn steps(report: &Value) -> Vec<(&str, &str)> {
    let steps = report["steps"].as_array().unwrap().iter();
    steps.map(|step| (step["id"].as_str().unwrap(), step["kind"].as_str().unwrap())).collect()
}

#[test]
fn the_voice_pipeline_hears_answers_and_says_it_again() {
    let (report, code, stderr) = site().json(&nobody(), &["run", "voice", "--audio", "question.wav"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(steps(&report), [("stt", "transcribe"), ("expert", "prompt"), ("tone", "modulate")]);
    let [stt, expert, tone] = [0, 1, 2].map(|step| &report["steps"][step]);
    // Half a minute of audio, and the words around it.
    assert!(stt["prompt_tokens"].as_u64().unwrap() > 750, "{stt}");
    assert!(is_file(&stt["served_by"], "omni.gguf") && is_file(&tone["served_by"], "lfm2.gguf"));
    assert!(is_file(&expert["served_by"], "solar.gguf") && !expert["fallback_reason"].is_null(), "{expert}");
    assert!(!report["text"].as_str().unwrap().is_empty() && report["text"] == tone["text"]);
    let started = |step: &Value| step["started_ms"].as_u64().unwrap();
    let said = started(stt) + stt["duration_ms"].as_u64().unwrap();
    assert!(said <= started(expert) && started(expert) <= started(tone), "{report}");
}

#[test]
fn the_vision_pipeline_sees_and_the_soft_one_opens_at_once() {
    let site = site();
    let vision = ["run", "vision", "--image", "picture.png", "--text", "What is it?"];
    let (report, code, stderr) = site.json(&nobody(), &vision);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert_eq!(steps(&report), [("see", "describe"), ("expert", "prompt")]);
    assert!(is_file(&report["steps"][0]["served_by"], "omni.gguf"));
    let (report, code, _) = site.json(&nobody(), &["run", "soft_hard", "--text", "hello"]);
    assert_eq!((code, steps(&report).len()), (0, 3));
    let started = |step: usize| report["steps"][step]["started_ms"].as_u64().unwrap();
    assert!(started(0) < 100 && started(1) < 100, "both begin at once: {report}");
}

#[test]
fn one_request_hears_sees_or_changes_the_tone() {
    let site = site();
    for arguments in [
        &["transcribe", "omni", "question.wav", "--language", "es"][..],
        &["describe", "omni", "picture.png", "--max-tokens", "8"],
        &[
            "chat",
            "omni",
            "What is it?",
            "--image",
            "picture.png",
            "--audio",
            "question.wav",
            "--max-tokens",
            "8",
        ],
    ] {
        let (answer, code, stderr) = site.json(&nobody(), arguments);
        assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}: {answer}");
        assert!(
            is_file(&answer["served_by"], "omni.gguf") && !answer["text"].as_str().unwrap().is_empty(),
            "{answer}"
        );
    }
    let (answer, code, _) = site.json(&nobody(), &["modulate", "lfm2", "formal", "hi there"]);
    assert_eq!((code, is_file(&answer["served_by"], "lfm2.gguf")), (0, true));
}

#[test]
fn what_is_no_audio_or_image_says_so_with_its_name() {
    let site = site();
    site.write("text.wav", "this is a text");
    site.write("broken.wav", [b"RIFF\xff\xff\xff\xffWAVE".as_slice(), b"and nothing of the kind"].concat());
    site.write("empty.png", "");
    let mut enormous = PNG.to_vec();
    enormous[16..24].copy_from_slice(&[0, 0, 0x4e, 0x20, 0, 0, 0x4e, 0x20]);
    site.write("enormous.png", enormous);
    for (arguments, code, said) in [
        (["transcribe", "omni", "text.wav"], 2, "text.wav: it is neither WAV, FLAC, MP3 nor OGG"),
        (["transcribe", "omni", "missing.wav"], 1, "cannot read missing.wav"),
        (["transcribe", "omni", "broken.wav"], 1, "the audio cannot be read: "),
        (["describe", "omni", "empty.png"], 2, "empty.png: it is neither PNG, JPEG, WebP nor GIF"),
        (["describe", "omni", "enormous.png"], 1, "the image cannot be read: "),
        (["transcribe", "lfm2", "question.wav"], 2, "model lfm2 cannot transcribe audio"),
        (["describe", "lfm2", "picture.png"], 2, "model lfm2 cannot see images"),
        (["modulate", "lfm2", "freindly"], 2, "unknown tone"),
    ] {
        let (answer, found, _) = site.json(&nobody(), &arguments);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!((found, message.contains(said)), (code, true), "{arguments:?}: {answer}");
    }
    let (answer, code, _) = site.json(&nobody(), &["run", "voice", "--text", "hello"]);
    assert_eq!((code, &answer["error"]["message"]), (2, &json!("pipeline voice needs audio")));
}

#[test]
fn a_projector_that_is_missing_or_another_models_is_named() {
    let site = site();
    let mmproj = site.path("models/demo/mmproj.gguf");
    let asked = |said: &str| {
        let (answer, code, _) = site.json(&nobody(), &["describe", "omni", "picture.png"]);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(code == 1 && message.contains("mmproj.gguf") && message.contains(said), "{said}: {answer}");
    };
    sarai_support::gguf::Projector::new(256).write_to(&mmproj).unwrap();
    asked("projection_dim of 256");
    std::fs::remove_file(&mmproj).unwrap();
    asked("cannot read");
}

#[test]
fn several_models_at_once_are_measured_and_checked() {
    let site = site();
    let concurrent = ["bench", "concurrent", "--shape", "tiny", "--tokens", "12", "--runs", "1"];
    let (report, code, _) = site.json(&nobody(), &concurrent);
    let models = report["models"].as_array().unwrap();
    assert_eq!(
        models.iter().map(|row| row["model"].as_str().unwrap()).collect::<Vec<_>>(),
        ["solar", "lfm2", "omni"]
    );
    assert_eq!(models[2]["saw_image"], true);
    assert!(!models[0]["fallback_reason"].is_null(), "{report}");
    for row in models {
        for speed in ["alone", "at_once"] {
            assert!(row[speed]["tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
            assert!(row[speed]["first_token_ms"].as_f64().unwrap() > 0.0, "{row}");
        }
        assert!(row["measured_bytes"].as_u64().unwrap() > 100_000, "{row}");
    }
    let checks = report["checks"].as_array().unwrap();
    // How fast tiny models are together is a matter of microseconds.
    let holds =
        |check: &&Value| check["holds"] == false && check["what"] != "at least as fast as one after another";
    assert_eq!(checks.iter().find(holds), None, "{report}");
    assert_eq!(code, i32::from(report["ratio"].as_f64().unwrap() < 1.0));
    assert!(report["peak_bytes"].as_u64() > Some(0) && report["evictions"] == 0);

    let (error, code, _) = site.json(&nobody(), &[&concurrent[..], &["--max-ram-gb", "0.001"]].concat());
    assert_eq!((code, &error["error"]["kind"]), (3, &json!("over_budget")), "{error}");
    let (error, code, _) = site.json(&nobody(), &["bench", "concurrent", "--models", "solar,nobody"]);
    assert_eq!(code, 2, "{error}");
}

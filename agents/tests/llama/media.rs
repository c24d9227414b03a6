//! Images and audio beside messages: seen and heard as if each request were alone, and kept like text.

use std::io::Cursor;
use std::sync::Arc;

use futures::StreamExt;
use futures::future::join_all;
use image::{ImageFormat, Rgb, RgbImage};
use sarai_agents::llama::{GgufBackend, GgufSettings, SessionStore};
use sarai_core::audio::Audio;
use sarai_core::backend::{Backend, Model as Loaded};
use sarai_core::config::Context;
use sarai_core::failure::FailureKind;
use sarai_core::image::Image;
use sarai_core::request::{
    Capability, Completion, Delta, GenerateRequest, Message, Sampling, TranscribeRequest,
};
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model, Projector};

use super::{ModelFile, assert_alike, chat, file, load, read, say, settings};

const WIDTH: u32 = 192;
/// Half a minute of audio, as Whisper's encoder gives it.
const AUDIO_TOKENS: u32 = 750;

/// A model that sees and hears, with its projector beside it.
fn seeing(kind: Kind) -> (ModelFile, GgufSettings) {
    let file = file(&Model::new(kind).n_ctx_train(4096).endless(true));
    let mmproj = file.path.with_file_name("mmproj.gguf");
    Projector::new(WIDTH).write_to(&mmproj).unwrap();
    let settings = GgufSettings {
        context: Context::Fixed(4096),
        mmproj: Some(mmproj),
        ..settings(&file.path, Capability::Generate)
    };
    (file, settings)
}

/// With positions in a grid, in a row, and with a state that cannot be cut.
fn kinds() -> [Kind; 3] {
    [Kind::Qwen2Vl, Kind::Llama, Kind::Lfm2]
}

fn image(width: u32, height: u32, of: impl Fn(u32, u32) -> [u8; 3]) -> Image {
    let pixels = RgbImage::from_fn(width, height, |x, y| Rgb(of(x, y)));
    let mut file = Cursor::new(Vec::new());
    pixels.write_to(&mut file, ImageFormat::Png).unwrap();
    Image::new(file.into_inner()).unwrap()
}

/// Pictures that differ, of different shapes.
fn picture(n: u8) -> Image {
    let (width, height) = (112 + 56 * u32::from(n % 3), 112 + 28 * u32::from(n % 2));
    image(width, height, move |x, y| [(x * 3) as u8 ^ n.wrapping_mul(70), (y * 2) as u8, n.wrapping_mul(90)])
}

/// A tone of this frequency.
fn tone(seconds: f32, frequency: f32) -> Audio {
    sound(&[(seconds, frequency, 0.3)])
}

/// Tones one after another: seconds, frequency, amplitude.
fn sound(parts: &[(f32, f32, f32)]) -> Audio {
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: 16_000,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut file = Cursor::new(Vec::new());
    let mut writer = hound::WavWriter::new(&mut file, spec).unwrap();
    for (seconds, frequency, amplitude) in parts {
        for n in 0..(seconds * 16_000.0) as u32 {
            let wave = (n as f32 / 16_000.0 * frequency * std::f32::consts::TAU).sin();
            writer.write_sample((wave * amplitude * f32::from(i16::MAX)) as i16).unwrap();
        }
    }
    writer.finalize().unwrap();
    Audio::new(file.into_inner()).unwrap()
}

fn greedy(most: u32) -> Sampling {
    Sampling { temperature: Some(0.0), max_tokens: Some(most), ..Sampling::default() }
}

fn ask(messages: &[Message]) -> GenerateRequest {
    GenerateRequest::chat(messages.to_vec()).with_sampling(greedy(12)).with_logprobs(2)
}

fn shown(n: u8) -> Vec<Message> {
    vec![Message::system("Be kind."), Message::user("What is this?").with_images(vec![picture(n)])]
}

async fn answer(model: &Arc<dyn Loaded>, messages: &[Message]) -> Completion {
    say(model, ask(messages)).await.unwrap().1
}

/// How far two answers' first tokens are apart, by their probabilities.
fn apart(one: &Completion, other: &Completion) -> f32 {
    let first = |completion: &Completion| completion.logprobs.as_ref().unwrap()[0].clone();
    let (one, other) = (first(one), first(other));
    if one.token == other.token { (one.logprob - other.logprob).abs() } else { f32::INFINITY }
}

#[tokio::test]
async fn each_picture_is_seen_as_itself_alone_and_beside_others() {
    for kind in kinds() {
        let (file, settings) = seeing(kind.clone());
        let model = load(settings).await.unwrap();
        let mut alone = Vec::new();
        for n in 0..4 {
            alone.push(answer(&model, &shown(n)).await);
        }
        let blank = answer(&model, &[Message::system("Be kind."), Message::user("What is this?")]).await;
        assert!(alone.iter().all(|seen| seen.prompt_tokens > blank.prompt_tokens), "{kind:?}");
        // Random weights tell pictures apart by little; by more than rounding does.
        let differ = (1..4).any(|n| apart(&alone[0], &alone[n]) > 1e-4);
        assert!(differ, "{kind:?}: pictures make no difference");
        let fresh = load(seeing_again(&file)).await.unwrap();
        let text = chat(greedy(12)).with_logprobs(2);
        let text_alone = say(&fresh, text.clone()).await.unwrap().1;
        let messages: Vec<_> = (0..4).map(shown).collect();
        let together = join_all(messages.iter().map(|messages| answer(&fresh, messages)));
        let (together, beside) = futures::join!(together, say(&fresh, text));
        for (n, together) in together.iter().enumerate() {
            assert_alike(&alone[n], together, &format!("{kind:?}, picture {n}"));
        }
        assert_alike(&text_alone, &beside.unwrap().1, &format!("{kind:?}, text beside pictures"));
    }
}

/// The same model, to be loaded a second time.
fn seeing_again(file: &ModelFile) -> GgufSettings {
    GgufSettings {
        context: Context::Fixed(4096),
        mmproj: Some(file.path.with_file_name("mmproj.gguf")),
        ..settings(&file.path, Capability::Generate)
    }
}

fn second(n: u8, said: &str) -> Vec<Message> {
    let mut messages = shown(n);
    messages.extend([Message::assistant(said), Message::user("And its colour?")]);
    messages
}

#[tokio::test]
async fn a_picture_of_an_earlier_turn_is_not_computed_again_also_after_a_reload() {
    for kind in kinds() {
        let (_file, cold) = seeing(kind.clone());
        let folder = tempfile::tempdir().unwrap();
        let store = || Some(SessionStore::new(folder.path(), Bytes(1 << 30)));
        let kept = || GgufSettings { sessions: store(), ..cold.clone() };
        let model = load(kept()).await.unwrap();
        let (said, first) = say(&model, ask(&shown(1))).await.unwrap();
        let warm = answer(&model, &second(1, &said)).await;
        model.unload().await;
        let anew = answer(&load(cold.clone()).await.unwrap(), &second(1, &said)).await;
        assert_alike(&anew, &warm, &format!("{kind:?}"));
        let before = first.prompt_tokens.unwrap();
        assert!(warm.cached_tokens.unwrap() + 1 >= before, "{kind:?}: {:?} of {before}", warm.cached_tokens);
        let model = load(kept()).await.unwrap();
        let restored = answer(&model, &second(1, &said)).await;
        assert_alike(&anew, &restored, &format!("{kind:?}, restored"));
        assert!(restored.cached_tokens.unwrap() + 1 >= before, "{kind:?}: {:?}", restored.cached_tokens);
        // Another picture in its place shares what is before it, and no more.
        let other = answer(&model, &second(2, &said)).await;
        let alone = answer(&load(cold.clone()).await.unwrap(), &second(2, &said)).await;
        assert_alike(&alone, &other, &format!("{kind:?}, another picture"));
        assert!(other.cached_tokens.unwrap() < before / 2, "{kind:?}: {:?}", other.cached_tokens);
    }
}

#[tokio::test]
async fn a_picture_that_nobody_waits_for_any_more_leaves_nothing_wrong_behind() {
    for kind in kinds() {
        let (_file, settings) = seeing(kind.clone());
        let cold = answer(&load(settings.clone()).await.unwrap(), &shown(3)).await;
        let model = load(settings).await.unwrap();
        let large = |n: u8| image(800, 700, move |x, y| [x as u8 ^ n, y as u8, n]);
        for n in 0..6 {
            let messages = [Message::user("What is this?").with_images(vec![large(n)])];
            let mut answering = model.generate(ask(&messages)).await.unwrap();
            if n % 2 == 1 {
                assert!(matches!(answering.next().await, Some(Ok(Delta::Text(_)))));
            }
            drop(answering);
        }
        assert_alike(&cold, &answer(&model, &shown(3)).await, &format!("{kind:?}"));
    }
}

#[tokio::test]
async fn audio_is_heard_beside_images_and_written_down_in_windows() {
    let (_file, settings) = seeing(Kind::Qwen2Vl);
    let model = load(settings).await.unwrap();
    let heard = |audio: Audio| [Message::user("What is this?").with_audio(vec![audio])];
    let low = answer(&model, &heard(tone(1.0, 200.0))).await;
    let high = answer(&model, &heard(tone(1.0, 3000.0))).await;
    assert!(low.prompt_tokens.unwrap() > AUDIO_TOKENS && low.prompt_tokens == high.prompt_tokens);
    assert!(apart(&low, &high) > 1e-4, "sounds make no difference");
    let both = Message::user("And this?").with_images(vec![picture(1)]).with_audio(vec![tone(1.0, 200.0)]);
    assert!(answer(&model, &[both]).await.prompt_tokens > low.prompt_tokens);

    let transcribe = |audio: Audio| {
        let request = TranscribeRequest::new(audio).with_sampling(greedy(5)).with_language("es");
        async { read(model.transcribe(request).await?).await }
    };
    let (text, short) = transcribe(tone(2.0, 440.0)).await.unwrap();
    assert!(!text.is_empty() && short.completion_tokens == Some(5));
    // Two windows: the silence between them is where it is cut, and one that is silent alone is left out.
    let long = sound(&[(25.0, 300.0, 0.3), (1.0, 1.0, 0.0), (20.0, 600.0, 0.3), (31.0, 1.0, 0.0)]);
    let (_, long) = transcribe(long).await.unwrap();
    assert_eq!(long.completion_tokens, Some(10));
    assert_eq!(long.prompt_tokens, short.prompt_tokens.map(|tokens| 2 * tokens));
    for nothing in [tone(0.0, 1.0), sound(&[(3.0, 100.0, 0.0)])] {
        assert_eq!(transcribe(nothing).await.unwrap_err().kind, FailureKind::NoSpeech);
    }
    let (_, again) = transcribe(tone(2.0, 440.0)).await.unwrap();
    assert_eq!(again.completion_tokens, short.completion_tokens);
}

#[tokio::test]
async fn what_is_no_picture_or_sound_or_too_long_is_refused_and_the_engine_goes_on() {
    let (_file, settings) = seeing(Kind::Qwen2Vl);
    let model = load(GgufSettings { context: Context::Fixed(512), ..settings }).await.unwrap();
    let expected = answer(&model, &shown(1)).await;
    let intact = picture(2);
    let broken = Image::new(intact.bytes()[..intact.bytes().len() / 2].to_vec()).unwrap();
    let noise = Audio::new(b"RIFF\xff\xff\xff\xffWAVEand then nothing of the kind".to_vec()).unwrap();
    let refused = |message: Message| {
        let model = &model;
        async move { say(model, ask(&[message])).await.unwrap_err() }
    };
    let kind = refused(Message::user("?").with_images(vec![broken])).await.kind;
    assert_eq!(kind, FailureKind::BadMedia);
    assert_eq!(refused(Message::user("?").with_audio(vec![noise])).await.kind, FailureKind::BadMedia);
    let long = refused(Message::user("?").with_audio(vec![tone(1.0, 100.0)])).await;
    assert_eq!(long.kind, FailureKind::ContextOverflow, "{long}");
    assert_alike(&expected, &answer(&model, &shown(1)).await, "afterwards");
}

#[tokio::test]
async fn a_model_without_eyes_or_ears_says_so() {
    let blind = file(&Model::new(Kind::Llama));
    let backend = GgufBackend::new(settings(&blind.path, Capability::Generate));
    let can = |backend: &GgufBackend| {
        [Capability::See, Capability::Hear, Capability::Transcribe].map(|one| backend.capabilities().has(one))
    };
    assert_eq!(can(&backend), [false; 3]);
    let model = load(settings(&blind.path, Capability::Generate)).await.unwrap();
    let failure = say(&model, ask(&shown(0))).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unsupported);
    assert!(failure.to_string().contains("mmproj"), "{failure}");
    let request = TranscribeRequest::new(tone(1.0, 100.0));
    assert_eq!(model.transcribe(request).await.err().unwrap().kind, FailureKind::Unsupported);

    let (_file, settings) = seeing(Kind::Qwen2Vl);
    assert_eq!(can(&GgufBackend::new(settings.clone())), [true; 3]);
    let mmproj = settings.mmproj.clone().unwrap();
    let mut deaf = Projector::new(WIDTH).writer();
    deaf.set("clip.has_audio_encoder", false);
    std::fs::write(&mmproj, deaf.to_bytes().unwrap()).unwrap();
    assert_eq!(can(&GgufBackend::new(settings.clone())), [true, false, false]);
    let model = load(settings).await.unwrap();
    assert!(say(&model, ask(&shown(0))).await.is_ok());
    let heard = Message::user("?").with_audio(vec![tone(1.0, 100.0)]);
    let failure = say(&model, ask(&[heard])).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unsupported, "{failure}");
}

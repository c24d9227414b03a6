//! Hosts that hear.

use std::sync::Arc;
use std::time::Duration;

use sarai_agents::remote::{HostApi, RemoteBackend};
use sarai_core::audio::Audio;
use sarai_core::backend::{Asked, Backend, Breaker, Hosts, LoadRequest};
use sarai_core::config::{HostConfig, HostKind};
use sarai_core::failure::FailureKind;
use sarai_core::image::Image;
use sarai_core::memory::Estimate;
use sarai_core::request::{Capability, Completion, GenerateRequest, Message, Sampling, TranscribeRequest};
use sarai_core::units::ApiKey;
use sarai_support::host::{Behaviour, Host};

use super::{LONG, ask, client, client_with, config, hello, named, read};

fn wav() -> Audio {
    Audio::new(b"RIFF\x24\0\0\0WAVEfmt and then samples".to_vec()).unwrap()
}

async fn transcribe(
    client: Arc<dyn HostApi>,
    request: TranscribeRequest,
) -> (String, Result<Completion, sarai_core::failure::Failure>) {
    let backend = RemoteBackend::new([(client, "whisper-1".to_owned())], None, Capability::Generate);
    let model = backend.load(LoadRequest::new(Estimate::default())).await.unwrap();
    match model.transcribe(request).await {
        Ok(stream) => read(stream).await,
        Err(failure) => (String::new(), Err(failure)),
    }
}

#[tokio::test]
async fn a_recording_is_sent_as_a_form_with_all_that_was_said() {
    let host = Host::start().await.unwrap();
    let key = Some(ApiKey::new("sk-secret".to_owned()));
    let client = client_with(HostKind::Openai, &HostConfig { api_key: key, ..config(&host.url()) });
    let sampling = Sampling { temperature: Some(0.25), ..Sampling::default() };
    let request =
        TranscribeRequest::new(wav()).with_language("es").with_prompt("SOLAR, Omni").with_sampling(sampling);
    let (text, end) = transcribe(client, request).await;
    assert!(end.is_ok());
    assert_eq!(text, "hola desde el host ñ😀", "without white space around it");
    let sent = host.requests().pop().unwrap();
    assert_eq!((sent.method.as_str(), sent.path.as_str()), ("POST", "/v1/audio/transcriptions"));
    assert_eq!(sent.authorization.as_deref(), Some("Bearer sk-secret"));
    let form = sent.body.as_str().unwrap().to_owned();
    let field = |name: &str, value: &str| form.contains(&format!("name=\"{name}\"\r\n\r\n{value}\r\n"));
    for (name, value) in [
        ("model", "whisper-1"),
        ("language", "es"),
        ("prompt", "SOLAR, Omni"),
        ("temperature", "0.25"),
        ("response_format", "json"),
    ] {
        assert!(field(name, value), "{name}: {form}");
    }
}

#[tokio::test]
async fn the_file_goes_byte_for_byte_with_the_name_and_type_of_its_format() {
    for (head, extension, media_type) in [
        (&b"RIFF\xff\xff\xff\xffWAVE"[..], "wav", "audio/wav"),
        (&b"fLaC"[..], "flac", "audio/flac"),
        (&b"\xff\xfb\x90\x00"[..], "mp3", "audio/mpeg"),
        (&b"OggS"[..], "ogg", "audio/ogg"),
    ] {
        // Every byte there is: also those that are no text.
        let every: Vec<u8> = (0..=u8::MAX).collect();
        let bytes = [head, &every[..]].concat();
        let host = Host::start().await.unwrap();
        let request = TranscribeRequest::new(Audio::new(bytes.clone()).unwrap());
        transcribe(client(HostKind::Openai, &host), request).await.1.unwrap();
        let headers =
            format!("name=\"file\"; filename=\"audio.{extension}\"\r\nContent-Type: {media_type}\r\n\r\n");
        let part = [headers.as_bytes(), &bytes[..], &b"\r\n--"[..]].concat();
        let sent = host.requests().pop().unwrap().bytes;
        assert!(sent.windows(part.len()).any(|window| window == part.as_slice()), "{extension}");
    }
}

#[tokio::test]
async fn what_is_left_to_the_host_is_not_sent_and_no_words_are_an_answer_without_text() {
    let host = Host::start().await.unwrap();
    host.say(&[" "]);
    let (text, end) = transcribe(client(HostKind::Openai, &host), TranscribeRequest::new(wav())).await;
    assert!(text.is_empty() && end.is_ok());
    let form = host.requests().pop().unwrap().body.as_str().unwrap().to_owned();
    assert!(
        !form.contains("language") && !form.contains("temperature") && !form.contains("name=\"prompt\""),
        "{form}"
    );
}

#[tokio::test]
async fn every_way_to_fail_has_its_kind() {
    for (behaviour, kind) in [
        (Behaviour::Status(500, "{\"error\": \"x\"}".into()), FailureKind::HostError),
        (Behaviour::Status(413, "{\"error\": \"too large\"}".into()), FailureKind::Refused),
        (Behaviour::Status(404, "{\"error\": \"no such path\"}".into()), FailureKind::ModelMissing),
        (Behaviour::Status(405, "{\"error\": \"no such method\"}".into()), FailureKind::ModelMissing),
        (Behaviour::RetryAfter(429, 7), FailureKind::Busy),
        (Behaviour::Html, FailureKind::Protocol),
        (Behaviour::Status(200, "{\"text\": ".into()), FailureKind::Protocol),
        (Behaviour::Status(200, "{}".into()), FailureKind::Protocol),
        (Behaviour::CutAfter(1), FailureKind::CutOff),
        (Behaviour::SlowFirstByte, FailureKind::Timeout),
        (Behaviour::StallAfter(0), FailureKind::Timeout),
    ] {
        let host = Host::start().await.unwrap();
        host.behave(behaviour.clone());
        let limit = Duration::from_millis(300);
        let short = HostConfig {
            first_token_timeout: limit,
            load_timeout: limit,
            stall_timeout: limit,
            ..config(&host.url())
        };
        let (_, end) = transcribe(client_with(HostKind::Openai, &short), TranscribeRequest::new(wav())).await;
        assert_eq!(end.unwrap_err().kind, kind, "{behaviour:?}");
        if matches!(kind, FailureKind::Timeout | FailureKind::CutOff) {
            assert!(host.connections_become(0, Duration::from_secs(5)).await, "{behaviour:?}");
        }
    }
}

#[tokio::test]
async fn a_host_that_does_not_transcribe_lets_another_one_answer_and_says_what_it_lacks() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::Status(404, "{\"error\": \"File Not Found\"}".into()));
    let (_, end) = transcribe(client(HostKind::Openai, &host), TranscribeRequest::new(wav())).await;
    let failure = end.unwrap_err();
    assert!(failure.kind.allows_fallback(), "{failure}");
    let said = failure.to_string();
    assert!(said.contains("File Not Found") && said.contains("/v1/audio/transcriptions"), "{said}");
}

#[tokio::test]
async fn a_long_recording_has_longer_than_a_first_token() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::Thinks(Duration::from_millis(200)));
    let short = HostConfig {
        first_token_timeout: Duration::from_millis(20),
        load_timeout: Duration::ZERO,
        ..config(&host.url())
    };
    for (seconds, expected) in [(0, Some(FailureKind::Timeout)), (60, None)] {
        let bytes = [wav().bytes(), &vec![0; seconds * 16_000]].concat();
        let request = TranscribeRequest::new(Audio::new(bytes).unwrap());
        let (_, end) = transcribe(client_with(HostKind::Openai, &short), request).await;
        assert_eq!(end.err().map(|failure| failure.kind), expected, "{seconds} s");
    }
}

#[tokio::test]
async fn a_host_without_the_path_is_not_taken_for_a_broken_one() {
    for status in [404, 405, 501] {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::Status(status, "{\"error\": \"not here\"}".into()));
        let named = (client(HostKind::Openai, &host), "omni".to_owned());
        let backend = RemoteBackend::new([named], None, Capability::Generate);
        let model = backend.load(LoadRequest::new(Estimate::default())).await.unwrap();
        for _ in 0..10 {
            let asked = model.transcribe(TranscribeRequest::new(wav())).await;
            assert_eq!(asked.err().map(|failure| failure.kind), Some(FailureKind::ModelMissing), "{status}");
        }
        assert!(backend.states().iter().all(|host| host.breaker == Breaker::Closed), "{status}");
    }
}

#[tokio::test]
async fn dropping_a_transcription_closes_its_connection() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::SlowFirstByte);
    let mut asking = Box::pin(transcribe(client(HostKind::Openai, &host), TranscribeRequest::new(wav())));
    let got = async {
        while host.requests().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        _answered = &mut asking => panic!("nothing was said yet"),
        () = got => {}
    }
    drop(asking);
    assert!(host.connections_become(0, LONG).await);
}

#[tokio::test]
async fn who_holds_the_model_asks_a_host_that_can() {
    let (deaf, hears) = (Host::start().await.unwrap(), Host::start().await.unwrap());
    let hosts = [
        (named("deaf", HostKind::Ollama, &config(&deaf.url())), "omni".to_owned()),
        (named("hears", HostKind::Openai, &config(&hears.url())), "omni".to_owned()),
    ];
    let backend = RemoteBackend::new(hosts, None, Capability::Generate);
    let model = backend.load(LoadRequest::new(Estimate::default())).await.unwrap();
    read(model.transcribe(TranscribeRequest::new(wav())).await.unwrap()).await.1.unwrap();
    let chat = GenerateRequest::chat(vec![Message::user("?").with_audio(vec![wav()])]);
    read(model.generate(chat).await.unwrap()).await.1.unwrap();
    assert_eq!((deaf.requests().len(), hears.requests().len()), (0, 2));
    read(model.generate(hello()).await.unwrap()).await.1.unwrap();
    assert_eq!(deaf.requests().len(), 1, "what both can goes to the first");
}

#[tokio::test]
async fn images_then_audio_then_the_question() {
    let host = Host::start().await.unwrap();
    let image = Image::new(&b"\xff\xd8\xff\xe0"[..]).unwrap();
    let message = Message::user("What is this?").with_images(vec![image]).with_audio(vec![wav()]);
    ask(&*client(HostKind::Openai, &host), &GenerateRequest::chat(vec![message])).await.1.unwrap();
    let content = &host.requests()[0].body["messages"][0]["content"];
    let kinds: Vec<_> =
        content.as_array().unwrap().iter().map(|part| part["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["image_url", "input_audio", "text"]);
    assert_eq!(content[1]["input_audio"]["format"], "wav");
}

#[tokio::test]
async fn an_ollama_does_not_hear_and_the_next_host_is_asked_without_it_counting_as_broken() {
    let (deaf, hears) = (Host::start().await.unwrap(), Host::start().await.unwrap());
    let hosts = [
        (named("deaf", HostKind::Ollama, &config(&deaf.url())), "omni".to_owned()),
        (named("hears", HostKind::Openai, &config(&hears.url())), "omni".to_owned()),
    ];
    let backend = RemoteBackend::new(hosts, None, Capability::Generate);
    let can = |one| backend.capabilities().has(one);
    assert!(can(Capability::See) && can(Capability::Hear) && can(Capability::Transcribe));
    let mut failed = Vec::new();
    let mut served = None;
    while served.is_none() {
        let asked = Asked { conversation: None, failed: &failed, last_resort: true };
        let host = backend.next(asked).await.unwrap().expect("one of them hears");
        match host.model.transcribe(TranscribeRequest::new(wav())).await {
            Ok(_) => served = Some(host.served_by.to_string()),
            Err(failure) => {
                assert!(failure.kind.allows_fallback(), "{failure}");
                assert!(failure.to_string().contains("cannot transcribe audio"), "{failure}");
                failed.push(host.served_by);
            }
        }
    }
    assert_eq!(served.as_deref(), Some("openai_http:hears"));
    assert!(
        deaf.requests().is_empty() && backend.states().iter().all(|host| host.breaker == Breaker::Closed)
    );
    let chat = GenerateRequest::chat(vec![Message::user("?").with_audio(vec![wav()])]);
    let failure = ask(&*client(HostKind::Ollama, &deaf), &chat).await.1.unwrap_err();
    assert_eq!(failure.kind, FailureKind::ModelMissing, "the rest of the chain may answer");
    assert!(failure.to_string().contains("cannot hear audio"), "{failure}");
    assert!(deaf.requests().is_empty(), "nothing is sent that it would leave out");
    let ollama =
        RemoteBackend::new([(client(HostKind::Ollama, &deaf), "m".to_owned())], None, Capability::Generate);
    assert!(ollama.capabilities().has(Capability::See) && !ollama.capabilities().has(Capability::Hear));
}

use std::time::Instant;

use futures::StreamExt;
use sarai_core::config::{HostConfig, HostKind};
use sarai_core::failure::FailureKind;
use sarai_core::request::{Delta, FinishReason};
use sarai_support::host::{Behaviour, Host};

use super::{KINDS, LONG, SHORT, ask, client, client_with, config, hello};

/// How a request ends against a behaviour: the text before the end, the kind, the message.
async fn ends(of: HostKind, behaviour: Behaviour) -> (String, FailureKind, String) {
    let host = Host::start().await.unwrap();
    host.behave(behaviour);
    let (text, end) = ask(&*client(of, &host), &hello()).await;
    let failure = end.unwrap_err();
    (text, failure.kind, failure.to_string())
}

#[tokio::test]
async fn a_refused_connection_is_unreachable_and_says_where() {
    for of in KINDS {
        let url = Host::refusing().await.unwrap();
        let (_, end) = ask(&*client_with(of, &config(&url)), &hello()).await;
        let failure = end.unwrap_err();
        assert_eq!(failure.kind, FailureKind::Unreachable);
        assert!(failure.to_string().to_lowercase().starts_with("connection refused"), "{failure}");
        assert!(failure.to_string().contains(&url), "{failure}");
    }
}

#[tokio::test]
async fn a_connection_is_tried_again_as_often_as_configured_and_no_oftener() {
    for of in KINDS {
        let url = Host::refusing().await.unwrap();
        let (_, end) = ask(&*client_with(of, &HostConfig { retries: 3, ..config(&url) }), &hello()).await;
        assert_eq!(end.unwrap_err().kind, FailureKind::Unreachable);
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::Status(500, "{}".into()));
        let (_, end) =
            ask(&*client_with(of, &HostConfig { retries: 3, ..config(&host.url()) }), &hello()).await;
        assert_eq!(end.unwrap_err().kind, FailureKind::HostError);
        assert_eq!(host.requests().len(), 1, "an answer is not asked for twice");
    }
}

#[tokio::test]
async fn a_black_hole_ends_at_the_deadline_for_the_first_token() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::BlackHole);
        let started = Instant::now();
        let (_, end) = ask(
            &*client_with(of, &HostConfig { first_token_timeout: SHORT, ..config(&host.url()) }),
            &hello(),
        )
        .await;
        let failure = end.unwrap_err();
        assert_eq!(failure.kind, FailureKind::Timeout);
        assert_eq!(failure.to_string(), "host lan: the first token took longer than 0.1 s");
        assert!(started.elapsed() >= SHORT && started.elapsed() < LONG / 2);
    }
}

#[tokio::test]
async fn each_status_is_what_it_means() {
    for of in KINDS {
        let body = |message: &str| format!("{{\"error\": \"{message}\"}}");
        for (status, body, kind) in [
            (404, body("no such model"), FailureKind::ModelMissing),
            (500, body("llama runner process has terminated"), FailureKind::HostError),
            (502, body("upstream"), FailureKind::HostError),
            (503, body("server busy"), FailureKind::Busy),
            (429, String::new(), FailureKind::Busy),
            (401, body("unauthorized"), FailureKind::Denied),
            (403, String::new(), FailureKind::Denied),
            (408, String::new(), FailureKind::Timeout),
            (400, body("invalid options"), FailureKind::Refused),
            (400, body("the input length exceeds the context length"), FailureKind::ContextOverflow),
        ] {
            let (text, got, message) = ends(of, Behaviour::Status(status, body.clone())).await;
            assert_eq!((text.as_str(), got), ("", kind), "{status}");
            let said = body.split('"').nth(3).unwrap_or("");
            assert!(message.contains(&status.to_string()) && message.contains(said), "{message}");
        }
    }
}

#[tokio::test]
async fn a_status_counts_even_if_its_explanation_never_comes() {
    for of in KINDS {
        let started = Instant::now();
        let (_, kind, message) = ends(of, Behaviour::StatusWithoutBody(500)).await;
        assert_eq!(kind, FailureKind::HostError, "{message}");
        assert!(started.elapsed() < LONG / 2);
    }
}

#[tokio::test]
async fn a_last_word_in_the_line_that_ends_the_answer_is_not_lost() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::LastWordWithEnd);
        let (text, end) = ask(&*client(of, &host), &hello()).await;
        assert_eq!(text, "hola desde el host ñ😀");
        end.unwrap();
    }
}

#[tokio::test]
async fn a_runner_that_dies_while_it_embeds_is_the_hosts_failure_although_it_says_400() {
    let host = Host::start().await.unwrap();
    for (message, kind) in [
        ("llama runner process has terminated: signal: killed", FailureKind::HostError),
        ("the input length exceeds the context length", FailureKind::ContextOverflow),
        ("invalid input type", FailureKind::Refused),
    ] {
        host.behave(Behaviour::Status(400, format!("{{\"error\": \"{message}\"}}")));
        let failed =
            client(HostKind::Ollama, &host).embed("e", None, &["text".to_owned()]).await.unwrap_err();
        assert_eq!(failed.kind(), kind, "{message}");
    }
}

#[tokio::test]
async fn a_page_instead_of_an_answer_is_no_answer() {
    for of in KINDS {
        let (_, kind, message) = ends(of, Behaviour::Html).await;
        assert_eq!(kind, FailureKind::Protocol);
        assert!(message.contains("does not speak the protocol of its kind: <html>"), "{message}");
        let (_, kind, message) =
            ends(of, Behaviour::Status(500, "<html>\n<h1>Bad Gateway</h1>".into())).await;
        assert_eq!((kind, message.contains("<html>")), (FailureKind::HostError, true));
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    for of in KINDS {
        let elsewhere = Host::start().await.unwrap();
        let (_, kind, message) = ends(of, Behaviour::Redirect(elsewhere.url())).await;
        assert_eq!(kind, FailureKind::Protocol, "{message}");
        assert!(elsewhere.requests().is_empty());
    }
}

#[tokio::test]
async fn a_cut_answer_is_never_taken_for_a_whole_one() {
    for of in KINDS {
        for tokens in [0, 1, 3] {
            let expected: String = ["hola ", "desde ", "el "][..tokens].concat();
            let (text, kind, _) = ends(of, Behaviour::CutAfter(tokens)).await;
            assert_eq!((text.as_str(), kind), (expected.as_str(), FailureKind::CutOff));
            let (text, kind, _) = ends(of, Behaviour::EndWithoutDone(tokens)).await;
            assert_eq!((text.as_str(), kind), (expected.as_str(), FailureKind::CutOff));
            let (text, kind, message) =
                ends(of, Behaviour::ErrorLineAfter(tokens, "out of memory".into())).await;
            assert_eq!((text.as_str(), kind), (expected.as_str(), FailureKind::HostError));
            assert_eq!(message, "host lan: out of memory");
        }
    }
}

#[tokio::test]
async fn a_slow_first_byte_is_waited_for() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::SlowFirstByte);
        let (client, request) = (client(of, &host), hello());
        let asking = ask(&*client, &request);
        tokio::pin!(asking);
        // The host has the request and says nothing.
        tokio::select! {
            _answered = &mut asking => panic!("nothing was said yet"),
            reached = host.connections_become(1, LONG) => assert!(reached),
        }
        let released = async {
            while host.requests().is_empty() {
                tokio::task::yield_now().await;
            }
            loop {
                host.release();
                tokio::task::yield_now().await;
            }
        };
        let (text, end) = tokio::select! { answer = &mut asking => answer, () = released => unreachable!() };
        assert_eq!(text, "hola desde el host ñ😀");
        end.unwrap();
    }
}

#[tokio::test]
async fn a_stall_ends_at_its_deadline_with_the_text_so_far() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::StallAfter(2));
        let (text, end) =
            ask(&*client_with(of, &HostConfig { stall_timeout: SHORT, ..config(&host.url()) }), &hello())
                .await;
        let failure = end.unwrap_err();
        assert_eq!((text.as_str(), failure.kind), ("hola desde ", FailureKind::Timeout));
        assert!(failure.to_string().contains("a pause between tokens"), "{failure}");
        assert!(host.connections_become(0, LONG).await, "the host is told by the end of the connection");
    }
}

#[tokio::test]
async fn the_whole_answer_has_a_deadline_too() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::StallAfter(1));
        let (_, end) =
            ask(&*client_with(of, &HostConfig { total_timeout: SHORT, ..config(&host.url()) }), &hello())
                .await;
        assert!(end.unwrap_err().to_string().contains("the whole answer took longer than 0.1 s"));
    }
}

#[tokio::test]
async fn lines_and_characters_may_be_cut_anywhere() {
    for of in KINDS {
        for behaviour in [Behaviour::Drip, Behaviour::Lump] {
            let host = Host::start().await.unwrap();
            host.behave(behaviour);
            let (text, end) = ask(&*client(of, &host), &hello()).await;
            let completion = end.unwrap();
            assert_eq!(text, "hola desde el host ñ😀");
            assert_eq!(completion.finish_reason, FinishReason::Stop);
            assert_eq!((completion.prompt_tokens, completion.completion_tokens), (Some(7), Some(4)));
            if of == HostKind::Ollama {
                assert_eq!(completion.decode_time.unwrap().as_secs(), 2, "as the host measured it");
            }
        }
    }
}

#[tokio::test]
async fn a_line_without_an_end_does_not_fill_memory() {
    for of in KINDS {
        let (_, kind, message) = ends(of, Behaviour::HugeLine(9 << 20)).await;
        assert_eq!(kind, FailureKind::Protocol);
        assert!(message.contains("a line of more than"), "{message}");
    }
}

#[tokio::test]
async fn dropping_a_stream_closes_its_connection() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::StallAfter(1));
        let client = client(of, &host);
        let mut stream = client.generate("m", None, &hello()).await.unwrap();
        assert!(matches!(stream.next().await, Some(Ok(Delta::Text(_)))));
        drop(stream);
        assert!(host.connections_become(0, LONG).await);
    }
}

#[tokio::test]
async fn numbers_that_are_texts_and_fields_that_are_new_are_no_matter() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::OddNumbers);
        let (text, end) = ask(&*client(of, &host), &hello()).await;
        assert_eq!(text, "hola desde el host ñ😀");
        assert_eq!(end.unwrap().prompt_tokens, Some(7));
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_end_the_answer_as_broken() {
    for of in KINDS {
        let (text, kind, _) = ends(of, Behaviour::BadText).await;
        assert_eq!((text.as_str(), kind), ("hola ", FailureKind::Protocol));
    }
}

#[tokio::test]
async fn a_host_of_the_other_protocol_is_told_by_its_first_answer() {
    let host = Host::start().await.unwrap();
    host.behave(Behaviour::Status(404, "404 page not found".into()));
    for of in KINDS {
        let (_, end) = ask(&*client(of, &host), &hello()).await;
        let failure = end.unwrap_err();
        assert!(failure.to_string().contains("404 page not found"), "{failure}");
    }
}

#[tokio::test]
async fn a_host_that_may_have_to_load_the_model_has_longer_for_its_first_token() {
    let host = Host::start().await.unwrap();
    let slow = HostConfig { first_token_timeout: SHORT, load_timeout: LONG, ..config(&host.url()) };
    let client = super::ollama(&slow);
    host.behave(Behaviour::SlowFirstByte);
    let (client_ref, request) = (&*client, hello());
    let asking = ask(client_ref, &request);
    tokio::pin!(asking);
    let waited = tokio::time::timeout(SHORT * 3, &mut asking).await;
    assert!(waited.is_err(), "it is still waited for");
    let released = async {
        loop {
            host.release();
            tokio::task::yield_now().await;
        }
    };
    let (text, _) = tokio::select! { answer = &mut asking => answer, () = released => unreachable!() };
    assert!(text.starts_with("hola"));
    // Now it surely holds the model.
    let (_, end) = ask(client_ref, &request).await;
    assert_eq!(end.unwrap_err().kind, FailureKind::Timeout);
}

#[tokio::test]
async fn a_connection_that_was_kept_and_is_gone_is_no_failure() {
    for of in KINDS {
        let host = Host::start().await.unwrap();
        host.behave(Behaviour::HangUpOnReuse);
        let client = client(of, &host);
        for _ in 0..3 {
            let (text, end) = ask(&*client, &hello()).await;
            assert_eq!(text, "hola desde el host ñ😀");
            end.unwrap();
        }
        assert_eq!(host.requests().len(), 5, "each but the first is asked twice");
    }
}

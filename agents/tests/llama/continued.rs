//! Answers that somebody else has begun.

use futures::StreamExt;
use sarai_core::failure::FailureKind;
use sarai_core::request::{Constraint, Delta, FinishReason, GenerateRequest, Prefill, Sampling, Truncate};
use sarai_support::gguf::Model;
use serde_json::{Value, json};

use super::{chat, kinds, llama, say};

fn greedy(max_tokens: u32) -> Sampling {
    Sampling { temperature: Some(0.0), max_tokens: Some(max_tokens), ..Sampling::default() }
}

fn begun(request: GenerateRequest, text: &str) -> GenerateRequest {
    // What a host tells of its tokens is not believed here.
    request.with_prefill(Prefill { text: text.to_owned(), tokens: 1 })
}

#[tokio::test]
async fn wherever_an_answer_was_cut_between_two_tokens_the_model_goes_on_as_it_would_have() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind).endless(true)).await;
        for request in [chat(greedy(20)), GenerateRequest::raw("the dog").with_sampling(greedy(20))] {
            let deltas = model.generate(request.clone()).await.unwrap();
            let pieces: Vec<String> = deltas
                .filter_map(async |delta| match delta.unwrap() {
                    Delta::Text(text) => Some(text),
                    Delta::Done(_) => None,
                })
                .collect()
                .await;
            let whole = pieces.concat();
            for cut in [1, 2, pieces.len() / 2, pieces.len() - 1] {
                let said = pieces[..cut].concat();
                let (rest, completion) = say(&model, begun(request.clone(), &said)).await.unwrap();
                assert_eq!(format!("{said}{rest}"), whole, "cut after {cut} pieces");
                assert_eq!(completion.finish_reason, FinishReason::Length);
                assert_eq!(completion.completion_tokens, Some(20), "the beginning counts");
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_had_all_its_tokens_ends_at_once() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind).endless(true)).await;
        let (whole, _) = say(&model, chat(greedy(12))).await.unwrap();
        let (rest, completion) = say(&model, begun(chat(greedy(12)), &whole)).await.unwrap();
        assert_eq!((rest.as_str(), completion.finish_reason), ("", FinishReason::Length));
    }
}

#[tokio::test]
async fn a_stop_text_across_the_seam_ends_the_answer() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind).endless(true)).await;
        let (whole, _) = say(&model, chat(greedy(20))).await.unwrap();
        let middle = (whole.len() / 2..).find(|at| whole.is_char_boundary(*at)).unwrap();
        let (said, rest) = whole.split_at(middle);
        let (before, after) =
            (said.chars().next_back().unwrap(), rest.chars().next().expect("it is longer than its half"));
        let sampling = Sampling { stop: vec![format!("{before}{after}")], ..greedy(20) };
        let (text, completion) = say(&model, begun(chat(sampling), said)).await.unwrap();
        if rest.starts_with(&text) && completion.finish_reason == FinishReason::Stop {
            assert_eq!(text, "", "what had begun before is not said");
        }
    }
}

#[tokio::test]
async fn a_schema_and_a_grammar_hold_for_the_whole() {
    let schema = json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "kind": {"enum": ["sun", "rain"]}},
        "required": ["city", "kind"],
        "additionalProperties": false,
    });
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind).endless(true)).await;
        let sampling = || Sampling {
            seed: Some(7),
            max_tokens: Some(200),
            temperature: Some(1.5),
            ..Sampling::default()
        };
        for said in [
            "{",
            "{\"city\"",
            "{\"city\": \"Le",
            "{\"city\": \"León\", \"ki",
            "{\"city\": \"León\", \"kind\": \"ra",
        ] {
            let request = chat(sampling()).with_constraint(Constraint::JsonSchema(schema.clone()));
            let (rest, _) = say(&model, begun(request, said)).await.unwrap();
            let text = format!("{said}{rest}");
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(["sun", "rain"].contains(&value["kind"].as_str().unwrap()), "{text}");
        }
        let grammar = || Constraint::Grammar("root ::= (\"yes\" | \"no\") \"-\" [0-9]{3}\n".to_owned());
        for said in ["y", "ye", "no-", "yes-12"] {
            let (rest, _) =
                say(&model, begun(chat(sampling()).with_constraint(grammar()), said)).await.unwrap();
            let text = format!("{said}{rest}");
            let (word, number) = text.split_once('-').unwrap();
            assert!(["yes", "no"].contains(&word) && number.len() == 3, "{text}");
        }
        for (constraint, said) in [(grammar(), "maybe"), (Constraint::JsonSchema(schema.clone()), "[1")] {
            let failure =
                say(&model, begun(chat(sampling()).with_constraint(constraint), said)).await.unwrap_err();
            assert_eq!(failure.kind, FailureKind::Engine, "{failure}");
        }
        say(&model, chat(greedy(2))).await.unwrap();
    }
}

#[tokio::test]
async fn a_conversation_that_is_too_long_loses_its_oldest_messages_and_not_the_answers_beginning() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind).endless(true)).await;
        let messages = (0..60).flat_map(|_| {
            [sarai_core::request::Message::user("the dog"), sarai_core::request::Message::assistant("a cat")]
        });
        let messages = messages.chain([sarai_core::request::Message::user("and now")]).collect();
        let request =
            GenerateRequest::chat(messages).with_sampling(greedy(8)).with_truncate(Truncate::Oldest);
        let (_, completion) = say(&model, begun(request, "the dog is")).await.unwrap();
        assert!(completion.truncated && completion.completion_tokens == Some(8), "{completion:?}");
    }
}

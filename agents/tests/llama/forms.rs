//! Answers that have to have a form, call tools, or come with their probabilities.

use sarai_core::failure::FailureKind;
use sarai_core::request::{Constraint, FinishReason, GenerateRequest, Message, Sampling, Tool};
use sarai_support::gguf::{Kind, Model};
use serde_json::{Value, json};

use super::{chat, kinds, llama, say};

fn sampled(seed: u32) -> Sampling {
    Sampling { seed: Some(seed), max_tokens: Some(200), temperature: Some(1.5), ..Sampling::default() }
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "city": { "type": "string", "maxLength": 8 },
            "days": { "type": "integer", "minimum": 1, "maximum": 9 },
            "kind": { "enum": ["sun", "rain"] },
        },
        "required": ["city", "days", "kind"],
        "additionalProperties": false,
    })
}

#[tokio::test]
async fn an_answer_under_a_schema_is_json_of_that_form_whatever_the_model_would_say() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind.clone()).endless(true)).await;
        for seed in 0..5 {
            let request = chat(sampled(seed)).with_constraint(Constraint::JsonSchema(schema()));
            let (text, completion) = say(&model, request).await.unwrap();
            let value: Value = serde_json::from_str(&text)
                .unwrap_or_else(|error| panic!("{kind:?} {error}: {text} {completion:?}"));
            assert!((1..=9).contains(&value["days"].as_i64().unwrap()), "{text}");
            assert!(["sun", "rain"].contains(&value["kind"].as_str().unwrap()), "{text}");
            assert!(value["city"].as_str().unwrap().chars().count() <= 8, "{text}");
        }
    }
}

#[tokio::test]
async fn an_answer_under_a_grammar_is_of_that_grammar() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind).endless(true)).await;
        let grammar = "root ::= (\"yes\" | \"no\") \"-\" [0-9]{3}\n";
        for seed in 0..5 {
            let request = chat(sampled(seed)).with_constraint(Constraint::Grammar(grammar.to_owned()));
            let (text, _) = say(&model, request).await.unwrap();
            let (word, number) = text.split_once('-').unwrap();
            assert!(["yes", "no"].contains(&word) && number.len() == 3, "{text}");
            assert!(number.chars().all(|c| c.is_ascii_digit()), "{text}");
        }
    }
}

#[tokio::test]
async fn a_form_that_cannot_be_kept_to_is_refused_and_the_engine_goes_on() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let bad = [
        Constraint::JsonSchema(json!({ "type": "no such type" })),
        Constraint::JsonSchema(json!({ "type": "string", "pattern": "(" })),
        Constraint::JsonSchema(json!({ "$ref": "#/nowhere" })),
        Constraint::JsonSchema(json!({ "not": { "type": "string" } })),
        Constraint::JsonSchema(json!(42)),
        Constraint::Grammar("root ::= \"unclosed".to_owned()),
        Constraint::Grammar("root ::= missing".to_owned()),
        Constraint::Grammar("root ::= root \"a\"".to_owned()),
        Constraint::Grammar(String::new()),
        Constraint::Grammar(format!("root ::= {}", "(".repeat(100_000))),
        Constraint::Grammar("root ::= \"a\0\"".to_owned()),
        // These would take all of the process's time or memory.
        Constraint::Grammar("root ::= \"a\"{3,1}".to_owned()),
        Constraint::Grammar(doubling("\"x\"")),
        Constraint::Grammar("root ::= a\na ::= b a \"x\" | \"y\"\nb ::= c\nc ::= \"z\" | \"\"".to_owned()),
        Constraint::Grammar("root ::= <|no such token|>".to_owned()),
    ];
    for constraint in bad {
        let shown = format!("{constraint:?}");
        let failure = say(&model, chat(sampled(1)).with_constraint(constraint)).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadRequest, "{}", &shown[..shown.len().min(80)]);
    }
    assert!(say(&model, chat(sampled(1))).await.is_ok());
}

/// Forty rules, each of which begins with the next one in two ways.
fn doubling(last: &str) -> String {
    let rules: String = (0..40).map(|n| format!("r{n} ::= r{0} | r{0}\n", n + 1)).collect();
    format!("root ::= r0\n{rules}r40 ::= {last}\n")
}

#[tokio::test]
async fn a_grammar_that_is_refused_says_why_and_where() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    for (grammar, said) in [
        ("root ::= \"unclosed".to_owned(), "line 1: a literal or a class is not closed"),
        ("root ::= missing".to_owned(), "rule `missing` is used and not defined"),
        (doubling("\"x\""), "rule `root` begins with other rules in too many ways"),
    ] {
        let request = chat(sampled(1)).with_constraint(Constraint::Grammar(grammar));
        let failure = say(&model, request).await.unwrap_err().to_string();
        assert_eq!(failure, format!("the grammar cannot be used: {said}"));
    }
}

#[tokio::test]
async fn a_form_that_the_vocabulary_cannot_say_ends_with_an_error() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    // The only token that the grammar allows is kept out.
    let grammar = Constraint::Grammar("root ::= \"q\"".to_owned());
    let request = chat(sampled(1)).with_constraint(grammar);
    let without = request.with_logit_bias([(u32::from(b'q') + 5, f32::NEG_INFINITY)]);
    let failure = say(&model, without).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Engine);
    assert!(failure.to_string().contains("no token that may come next"), "{failure}");
    assert!(say(&model, chat(sampled(1))).await.is_ok());
}

#[tokio::test]
async fn each_tokens_probability_comes_with_its_alternatives() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let greedy = Sampling { temperature: Some(0.0), max_tokens: Some(8), ..Sampling::default() };
    let (text, completion) = say(&model, chat(greedy.clone()).with_logprobs(3)).await.unwrap();
    let logprobs = completion.logprobs.unwrap();
    assert_eq!(logprobs.len() as u32, completion.completion_tokens.unwrap());
    assert_eq!(logprobs.iter().map(|token| token.token.as_str()).collect::<String>(), text);
    for token in &logprobs {
        assert!(token.logprob <= 0.0 && token.top.len() == 3);
        assert_eq!(
            (&token.top[0].token, token.top[0].logprob),
            (&token.token, token.logprob),
            "the likeliest was taken"
        );
        assert!(token.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
    }
    assert_eq!(say(&model, chat(greedy.clone())).await.unwrap().1.logprobs, None);
    let most = say(&model, chat(greedy.clone()).with_logprobs(20)).await.unwrap().1.logprobs.unwrap();
    assert!(most.iter().all(|token| token.top.len() == 20));
    let more = say(&model, chat(greedy).with_logprobs(21)).await.unwrap_err();
    assert_eq!(more.kind, FailureKind::BadRequest);
}

#[tokio::test]
async fn sampling_by_what_is_no_number_is_refused() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    for sampling in [
        Sampling { temperature: Some(f32::NAN), ..Sampling::default() },
        Sampling { top_p: Some(f32::INFINITY), ..Sampling::default() },
        Sampling { min_p: Some(-1.0), ..Sampling::default() },
    ] {
        let failure = say(&model, chat(sampling)).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadRequest, "{failure}");
    }
    assert!(say(&model, chat(sampled(1))).await.is_ok());
}

fn weather() -> Tool {
    Tool {
        name: "weather".into(),
        description: "The weather of a city".into(),
        parameters: json!({ "type": "object", "properties": { "city": { "type": "string" } } }),
    }
}

#[tokio::test]
async fn a_call_that_a_model_writes_is_the_end_of_its_answer_and_no_text() {
    let call = [
        "<tool_call>",
        "\n{\"name\": \"weather\", ",
        "\"arguments\": {\"city\": \"Alcalá\"}}\n",
        "</tool_call>",
    ];
    for kind in kinds() {
        for before in ["", "Let me see. "] {
            let texts = [before].into_iter().filter(|text| !text.is_empty()).chain(call);
            let (_file, model) = llama(Model::new(kind.clone()).says(texts)).await;
            let greedy = Sampling { temperature: Some(0.0), ..Sampling::default() };
            let request = chat(greedy.clone()).with_tools(vec![weather()]);
            let (text, completion) = say(&model, request).await.unwrap();
            assert_eq!(
                (text.as_str(), completion.finish_reason),
                (before, FinishReason::ToolCalls),
                "{kind:?}"
            );
            let [call] = completion.tool_calls.as_slice() else { panic!("{completion:?}") };
            assert_eq!((call.name.as_str(), &call.arguments["city"]), ("weather", &json!("Alcalá")));
            // Its result goes back to it.
            let conversation = vec![
                Message::user("¿Qué tiempo hace?"),
                Message::assistant("").with_tool_calls(completion.tool_calls),
                Message::tool("weather", "sunny"),
            ];
            let next = GenerateRequest::chat(conversation).with_sampling(greedy.clone());
            assert!(say(&model, next.with_tools(vec![weather()])).await.is_ok());
            // Without tools it is text as any other.
            let (text, completion) = say(&model, chat(greedy)).await.unwrap();
            assert!(text.contains("<tool_call>") && completion.tool_calls.is_empty());
            assert_eq!(completion.finish_reason, FinishReason::Stop);
        }
    }
}

#[tokio::test]
async fn tools_are_told_to_the_model_and_do_not_go_with_a_fixed_form() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let plain = GenerateRequest::chat(vec![Message::user("Hi")])
        .with_sampling(Sampling { max_tokens: Some(4), ..sampled(1) });
    let with = plain.clone().with_tools(vec![weather()]);
    let before = say(&model, plain).await.unwrap().1.prompt_tokens.unwrap();
    let (_, completion) = say(&model, with.clone()).await.unwrap();
    assert!(completion.prompt_tokens.unwrap() > before + 30, "the model reads what it may call");
    assert_eq!(completion.tool_calls, []);
    let raw = GenerateRequest { prompt: sarai_core::request::Prompt::Raw("Hi".into()), ..with.clone() };
    assert_eq!(say(&model, raw).await.unwrap_err().kind, FailureKind::BadRequest);
    let both = with.with_constraint(Constraint::JsonSchema(schema()));
    assert_eq!(say(&model, both).await.unwrap_err().kind, FailureKind::BadRequest);
}

#[tokio::test]
async fn a_bias_makes_a_token_certain_or_keeps_it_out() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    let greedy = Sampling { temperature: Some(0.0), max_tokens: Some(8), ..Sampling::default() };
    // Five special tokens come before the bytes.
    let token = |byte: u8| u32::from(byte) + 5;
    let certain = chat(greedy.clone()).with_logit_bias([(token(b'z'), 1e4)]);
    assert_eq!(say(&model, certain).await.unwrap().0, "zzzzzzzz");
    for (out, left) in [(b'y', "z"), (b'z', "y")] {
        let either = Constraint::Grammar(r#"root ::= "y" | "z""#.to_owned());
        let request = chat(greedy.clone()).with_constraint(either);
        let request = request.with_logit_bias([(token(out), f32::NEG_INFINITY)]);
        assert_eq!(say(&model, request).await.unwrap().0, left);
    }
    let unknown = chat(greedy.clone()).with_logit_bias([(1 << 30, 1.0)]);
    let refused = say(&model, unknown).await.unwrap_err();
    assert_eq!(refused.kind, FailureKind::BadRequest);
    assert!(refused.to_string().contains("token 1073741824"), "{refused}");
    let no_number = chat(greedy).with_logit_bias([(token(b'z'), f32::NAN)]);
    assert_eq!(say(&model, no_number).await.unwrap_err().kind, FailureKind::BadRequest);
}

#[tokio::test]
async fn penalties_change_what_is_said() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    let greedy = Sampling { temperature: Some(0.0), max_tokens: Some(200), ..Sampling::default() };
    let plain = say(&model, chat(greedy.clone())).await.unwrap().0;
    let presence = Sampling { presence_penalty: Some(50.0), ..greedy.clone() };
    let frequency = Sampling { frequency_penalty: Some(50.0), ..greedy };
    assert_ne!(say(&model, chat(presence)).await.unwrap().0, plain);
    assert_ne!(say(&model, chat(frequency)).await.unwrap().0, plain);
}

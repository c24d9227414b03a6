//! Several requests at once on one model, and what they share.

use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use sarai_agents::llama::GgufSettings;
use sarai_core::config::Context;
use sarai_core::failure::FailureKind;
use sarai_core::request::{Capability, Delta, FinishReason, GenerateRequest, Message, Sampling};
use sarai_support::gguf::{Kind, Model};

use super::{assert_alike, chat, file, kinds, llama, load, say, settings};

fn greedy(most: u32) -> Sampling {
    Sampling { temperature: Some(0.0), max_tokens: Some(most), ..Sampling::default() }
}

/// `turns` questions below instructions of some length.
fn messages(turns: &[&str]) -> Vec<Message> {
    let instructions = Message::system("the dog and the cat are here and now ".repeat(20));
    let turns = turns.iter().map(|text| Message::user(*text));
    std::iter::once(instructions).chain(turns).collect()
}

/// A conversation of `turns` questions below instructions of some length.
fn conversation(turns: &[&str]) -> GenerateRequest {
    GenerateRequest::chat(messages(turns)).with_sampling(greedy(16)).with_logprobs(2)
}

#[tokio::test]
async fn answers_are_the_same_alone_and_beside_others() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind.clone()).endless(true)).await;
        let request = |n: usize| {
            GenerateRequest::raw("the dog and the cat ".repeat(1 + n * 5))
                .with_sampling(greedy(20 + n as u32))
                .with_logprobs(2)
        };
        let mut alone = Vec::new();
        for n in 0..6 {
            alone.push(say(&model, request(n)).await.unwrap().1);
        }
        let together = join_all((0..6).map(|n| say(&model, request(n)))).await;
        for (alone, together) in alone.iter().zip(together) {
            assert_alike(alone, &together.unwrap().1, &format!("{kind:?}"));
        }
    }
}

#[tokio::test]
async fn a_later_turn_goes_on_with_what_is_there_and_says_the_same_as_anew() {
    for kind in kinds() {
        let model = Model::new(kind.clone()).endless(true);
        let (_file, warm) = llama(model.clone()).await;
        let (_other, cold) = llama(model).await;
        let (first, completion) = say(&warm, conversation(&["¿Cómo estás?"])).await.unwrap();
        assert_eq!(completion.cached_tokens, Some(0));
        let turn = |first: &str| {
            let mut messages = messages(&["¿Cómo estás?"]);
            messages.extend([Message::assistant(first), Message::user("¿Y tú?")]);
            GenerateRequest::chat(messages).with_sampling(greedy(16)).with_logprobs(2)
        };
        let warm = say(&warm, turn(&first)).await.unwrap().1;
        let cold = say(&cold, turn(&first)).await.unwrap().1;
        assert_alike(&cold, &warm, &format!("{kind:?}"));
        assert_eq!(cold.cached_tokens, Some(0));
        let before = completion.prompt_tokens.unwrap();
        assert!(warm.cached_tokens.unwrap() + 1 >= before, "{kind:?}: {:?} of {before}", warm.cached_tokens);
    }
}

#[tokio::test]
async fn a_turn_that_is_cancelled_loses_nothing_of_its_conversation() {
    for kind in kinds() {
        let file = file(&Model::new(kind.clone()).n_ctx_train(8192).endless(true));
        let long =
            GgufSettings { context: Context::Fixed(8192), ..settings(&file.path, Capability::Generate) };
        let model = load(long).await.unwrap();
        let mut messages = messages(&["¿Cómo estás?"]);
        let ask =
            |messages: &[Message], most| GenerateRequest::chat(messages.to_vec()).with_sampling(greedy(most));
        let (said, first) = say(&model, ask(&messages, 16)).await.unwrap();
        messages.push(Message::assistant(said));
        let turn = |text: String| [messages.as_slice(), &[Message::user(text)]].concat();
        // While its prompt is read, as far as that has begun; and while it is answered.
        for _ in 0..10 {
            drop(model.generate(ask(&turn("the dog and the cat ".repeat(1000)), 16)).await.unwrap());
        }
        let mut answering = model.generate(ask(&turn("¿Y tú?".to_owned()), 1000)).await.unwrap();
        assert!(matches!(answering.next().await, Some(Ok(Delta::Text(_)))));
        drop(answering);
        let (_, third) = say(&model, ask(&turn("¿Y ella?".to_owned()), 16)).await.unwrap();
        let before = first.prompt_tokens.unwrap();
        assert!(
            third.cached_tokens.unwrap() + 1 >= before,
            "{kind:?}: {:?} of {before}",
            third.cached_tokens
        );
    }
}

#[tokio::test]
async fn a_common_beginning_is_computed_once_also_for_requests_that_come_together() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind.clone())).await;
        let asked = ["uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho"];
        let answers = join_all(asked.map(|text| say(&model, conversation(&[text])))).await;
        let answers: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().1).collect();
        let all: u32 = answers.iter().map(|answer| answer.prompt_tokens.unwrap()).sum();
        let computed = all - answers.iter().map(|answer| answer.cached_tokens.unwrap()).sum::<u32>();
        assert!(f64::from(computed) <= 0.25 * f64::from(all), "{kind:?}: {computed} of {all}");
        // And it changes nothing of what they say.
        let (_other, cold) = llama(Model::new(kind.clone())).await;
        let alone = say(&cold, conversation(&["ocho"])).await.unwrap().1;
        let shared = say(&model, conversation(&["ocho"])).await.unwrap().1;
        assert_alike(&alone, &shared, &format!("{kind:?}"));
    }
}

#[tokio::test]
async fn requests_that_together_outgrow_the_context_are_all_answered_in_full() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind.clone()).endless(true)).await;
        // Four of 300 tokens in a context of 512.
        let request = |n: usize| {
            let text = ["dog", "cat", "man", "day"][n];
            GenerateRequest::raw(text).with_sampling(greedy(300)).with_logprobs(2)
        };
        let mut alone = Vec::new();
        for n in 0..4 {
            alone.push(say(&model, request(n)).await.unwrap().1);
        }
        let together = join_all((0..4).map(|n| say(&model, request(n)))).await;
        for (answer, alone) in together.into_iter().zip(alone) {
            let (_, completion) = answer.unwrap();
            assert_eq!(completion.completion_tokens, Some(300), "{kind:?}");
            assert_alike(&alone, &completion, &format!("{kind:?}"));
        }
    }
}

#[tokio::test]
async fn a_short_request_does_not_wait_for_the_end_of_a_long_one() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    let mut long = model.generate(GenerateRequest::raw("the dog").with_sampling(greedy(900))).await.unwrap();
    assert!(matches!(long.next().await, Some(Ok(Delta::Text(_)))));
    let (_, short) = say(&model, chat(greedy(3))).await.unwrap();
    assert_eq!(short.completion_tokens, Some(3));
    let mut more = 0;
    while let Some(Some(delta)) = futures::future::poll_immediate(long.next()).await {
        assert!(matches!(delta, Ok(Delta::Text(_))), "the long one has not ended yet");
        more += 1;
    }
    assert!(more > 0, "the long one had its turns as well");
}

#[tokio::test]
async fn a_request_that_is_given_up_while_its_prompt_is_read_frees_its_place() {
    for kind in kinds() {
        let file = file(&Model::new(kind).n_ctx_train(8192).endless(true));
        let mut one = settings(&file.path, Capability::Generate);
        (one.parallel, one.context) = (Some(1), Context::Fixed(8192));
        let model = load(one).await.unwrap();
        let long = || GenerateRequest::raw("the dog and the cat ".repeat(1500)).with_sampling(greedy(1));
        for _ in 0..20 {
            // Dropped as soon as the engine has it.
            drop(model.generate(long()).await.unwrap());
        }
        let answered = tokio::time::timeout(Duration::from_secs(60), say(&model, chat(greedy(3)))).await;
        assert_eq!(answered.unwrap().unwrap().1.completion_tokens, Some(3));
    }
}

#[tokio::test]
async fn a_context_of_a_few_tokens_serves_several_requests_too() {
    for kind in kinds() {
        for n_ctx in [1, 2, 8] {
            let file = file(&Model::new(kind.clone()).endless(true));
            let mut short = settings(&file.path, Capability::Generate);
            short.context = Context::Fixed(n_ctx);
            let model = load(short).await.unwrap();
            let request = || GenerateRequest::raw("dog").with_sampling(greedy(20));
            for answer in join_all((0..6).map(|_| say(&model, request()))).await {
                assert_eq!(answer.unwrap().1.completion_tokens, Some(20), "{kind:?} {n_ctx}");
            }
        }
    }
}

#[tokio::test]
async fn a_request_for_no_tokens_is_over_at_once() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let (text, completion) = say(&model, chat(greedy(0))).await.unwrap();
    assert_eq!((text.as_str(), completion.finish_reason), ("", FinishReason::Length));
    assert_eq!(completion.completion_tokens, Some(0));
}

#[tokio::test]
async fn a_prompt_of_a_megabyte_is_refused_and_the_engine_goes_on() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    for text in ["x".repeat(1 << 20), "the dog ".repeat(1 << 17), "\0".repeat(1 << 20), "ñ".repeat(1 << 19)]
    {
        let failure = say(&model, GenerateRequest::raw(text)).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::ContextOverflow);
    }
    let (_, completion) = say(&model, GenerateRequest::raw("a\0b").with_sampling(greedy(3))).await.unwrap();
    assert_eq!(completion.completion_tokens, Some(3));
}

#[tokio::test]
async fn the_oldest_messages_go_where_the_request_allows_it() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind)).await;
        let mut messages = vec![Message::system("Be kind.")];
        for n in 0..40 {
            messages.push(Message::user(format!("the dog and the cat {n}")));
            messages.push(Message::assistant("the man and the day".repeat(2)));
        }
        messages.push(Message::user("¿Cómo estás?"));
        let long = GenerateRequest::chat(messages.clone()).with_sampling(greedy(5));
        assert_eq!(say(&model, long.clone()).await.unwrap_err().kind, FailureKind::ContextOverflow);
        let cut = long.with_truncate(sarai_core::request::Truncate::Oldest);
        let (_, completion) = say(&model, cut.clone()).await.unwrap();
        assert!(completion.truncated);
        let tokens = completion.prompt_tokens.unwrap();
        assert!((200..512).contains(&tokens), "as many as fit: {tokens}");
        // One that fits is left alone.
        let short = chat(greedy(5)).with_truncate(sarai_core::request::Truncate::Oldest);
        assert!(!say(&model, short).await.unwrap().1.truncated);
        // The last message alone is too long.
        let endless = GenerateRequest::chat(vec![Message::user("the dog ".repeat(2000))])
            .with_truncate(sarai_core::request::Truncate::Oldest);
        assert_eq!(say(&model, endless).await.unwrap_err().kind, FailureKind::ContextOverflow);
        let raw = GenerateRequest::raw("the dog ".repeat(2000))
            .with_sampling(greedy(5))
            .with_truncate(sarai_core::request::Truncate::Oldest);
        assert!(say(&model, raw).await.unwrap().1.truncated);
    }
}

#[tokio::test]
async fn no_more_turns_go_than_have_to_also_where_roles_have_to_alternate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut writer = Model::new(Kind::Llama).writer().unwrap();
    writer.set(
        "tokenizer.chat_template",
        "{% for m in messages %}\
         {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
         [{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}[assistant]",
    );
    writer.create(&path).unwrap();
    let model = load(settings(&path, Capability::Generate)).await.unwrap();
    let turns = |turns: std::ops::Range<usize>| {
        let turn =
            |n| [Message::user(format!("the dog {n}")), Message::assistant("the man and the day".repeat(4))];
        let last = [Message::user("¿Cómo estás?")];
        GenerateRequest::chat(turns.flat_map(turn).chain(last).collect()).with_sampling(greedy(5))
    };
    let cut = turns(0..40).with_truncate(sarai_core::request::Truncate::Oldest);
    let (_, completion) = say(&model, cut).await.unwrap();
    assert!(completion.truncated);
    // One turn more would leave no room for the answer.
    let mut lengths = Vec::new();
    for first in 20..40 {
        if let Ok((_, completion)) = say(&model, turns(first..40)).await {
            lengths.push(completion.prompt_tokens.unwrap());
        }
    }
    let most = lengths.into_iter().filter(|tokens| tokens + 5 <= 512).max();
    assert_eq!(completion.prompt_tokens, most);
}

#[tokio::test]
async fn requests_that_are_dropped_together_leave_other_conversations_as_they_are() {
    for kind in kinds() {
        let file = file(&Model::new(kind.clone()).endless(true));
        let model = load(settings(&file.path, Capability::Generate)).await.unwrap();
        let turn = |text: &str| GenerateRequest::raw(text).with_sampling(greedy(16)).with_logprobs(2);
        let first = "the dog and the cat in the garden ".repeat(12);
        let said = say(&model, turn(&first)).await.unwrap().0;
        let second = format!("{first}{said} and then");
        let cold = load(settings(&file.path, Capability::Generate)).await.unwrap();
        let alone = say(&cold, turn(&second)).await.unwrap().1;
        for round in 0..8 {
            let endless = |n| {
                let text = format!("{n} {round} {}", "the house of the bird ".repeat(40));
                model.generate(GenerateRequest::raw(text).with_sampling(greedy(500)))
            };
            let mut two = futures::future::try_join(endless(1), endless(2)).await.unwrap();
            // One writes, or both do.
            assert!(two.0.next().await.unwrap().is_ok());
            drop(two);
        }
        let completion = say(&model, turn(&second)).await.unwrap().1;
        assert_alike(&alone, &completion, &format!("{kind:?}"));
    }
}

#[tokio::test]
async fn two_models_on_one_file_share_its_weights() {
    let file = file(&Model::new(Kind::Llama).n_embd(512).n_head(8).n_layer(4));
    let mut own = settings(&file.path, Capability::Generate);
    own.weights = sarai_core::config::Weights::Repack;
    let first = load(own.clone()).await.unwrap();
    let second = load(own.clone()).await.unwrap();
    let answer = say(&first, chat(greedy(8))).await.unwrap().0;
    first.unload().await;
    assert_eq!(say(&second, chat(greedy(8))).await.unwrap().0, answer, "the one that is left still has them");
}

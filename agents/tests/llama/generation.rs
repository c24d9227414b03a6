use futures::StreamExt;
use sarai_core::failure::FailureKind;
use sarai_core::request::{Capability, Delta, FinishReason, GenerateRequest, Sampling};
use sarai_support::gguf::{Kind, Model};

use super::{chat, kinds, llama, load, say, seeded, settings};

#[tokio::test]
async fn the_same_seed_gives_the_same_text_and_another_one_another() {
    for kind in kinds() {
        let (_file, model) = llama(Model::new(kind)).await;
        let (first, completion) = say(&model, chat(seeded(1))).await.unwrap();
        let (again, _) = say(&model, chat(seeded(1))).await.unwrap();
        assert_eq!(first, again);
        assert!(!first.is_empty());
        assert!(completion.prompt_tokens.unwrap() > 5);
        let mut others = Vec::new();
        for seed in 2..8 {
            others.push(say(&model, chat(seeded(seed))).await.unwrap().0);
        }
        assert!(others.iter().any(|other| *other != first), "{first:?} whatever the seed");
    }
}

#[tokio::test]
async fn max_tokens_is_kept_to_and_said() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    for most in [1, 7] {
        let sampling = Sampling { max_tokens: Some(most), ..seeded(1) };
        let (_, completion) = say(&model, chat(sampling)).await.unwrap();
        assert_eq!(
            (completion.completion_tokens, completion.finish_reason),
            (Some(most), FinishReason::Length)
        );
    }
}

#[tokio::test]
async fn an_answer_ends_with_the_context_at_the_latest() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    let (_, completion) = say(&model, chat(Sampling::default())).await.unwrap();
    let total = completion.prompt_tokens.unwrap() + completion.completion_tokens.unwrap();
    assert_eq!((Some(total), completion.finish_reason), (model.n_ctx(), FinishReason::Length));
}

#[tokio::test]
async fn a_model_that_ends_its_answer_has_stopped() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let (_, completion) = say(&model, chat(Sampling { seed: Some(3), ..Sampling::default() })).await.unwrap();
    assert_eq!(completion.finish_reason, FinishReason::Stop);
}

#[tokio::test]
async fn a_stop_text_ends_the_answer_before_itself() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let greedy = Sampling { temperature: Some(0.0), max_tokens: Some(24), ..Sampling::default() };
    let (whole, _) = say(&model, chat(greedy.clone())).await.unwrap();
    let middle: String = whole.chars().skip(whole.chars().count() / 2).take(4).collect();
    let (cut, completion) =
        say(&model, chat(Sampling { stop: vec![middle.clone()], ..greedy })).await.unwrap();
    assert_eq!(cut, whole.split(&middle).next().unwrap());
    assert_eq!(completion.finish_reason, FinishReason::Stop);
}

#[tokio::test]
async fn a_prompt_that_fills_the_context_is_refused_with_its_numbers() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let failure = say(&model, GenerateRequest::raw("word ".repeat(600))).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::ContextOverflow);
    assert!(failure.to_string().contains("the context of 512"), "{failure}");
    let empty = say(&model, GenerateRequest::raw("")).await.unwrap_err();
    assert_eq!(empty.kind, FailureKind::BadRequest);
}

#[tokio::test]
async fn a_prompt_longer_than_one_step_is_read_whole() {
    let (_file, model) = llama(Model::new(Kind::Llama)).await;
    let request = GenerateRequest::raw("the dog and the cat ".repeat(40)).with_sampling(seeded(1));
    let (_, completion) = say(&model, request).await.unwrap();
    assert!(completion.prompt_tokens.unwrap() > 150, "{completion:?}");
}

#[tokio::test]
async fn a_reader_who_leaves_makes_room_for_the_next_request() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    for _ in 0..20 {
        let mut stream = model.generate(chat(Sampling::default())).await.unwrap();
        assert!(matches!(stream.next().await, Some(Ok(Delta::Text(_)))));
    }
    let (_, completion) = say(&model, chat(seeded(1))).await.unwrap();
    assert_eq!(completion.completion_tokens, Some(24));
}

#[tokio::test]
async fn repetition_can_be_made_dear() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    let greedy = Sampling { temperature: Some(0.0), max_tokens: Some(200), ..Sampling::default() };
    let plain = say(&model, chat(greedy.clone())).await.unwrap().0;
    let dear = say(&model, chat(Sampling { repeat_penalty: Some(50.0), ..greedy })).await.unwrap().0;
    assert_ne!(plain, dear);
}

#[tokio::test]
async fn a_vocabulary_without_a_first_token_and_a_prompt_that_is_nothing_to_it_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut writer = Model::new(Kind::Llama).writer().unwrap();
    // A pre-tokenizer for which llama.cpp assumes no first token.
    writer.set("tokenizer.ggml.model", "gpt2");
    writer.set("tokenizer.ggml.pre", "chatglm-bpe");
    writer.set("tokenizer.ggml.merges", Vec::<String>::new());
    writer.remove("tokenizer.ggml.bos_token_id");
    writer.create(&path).unwrap();
    let model = load(settings(&path, Capability::Generate)).await.unwrap();
    let (_, completion) = say(&model, GenerateRequest::raw("hello").with_sampling(seeded(1))).await.unwrap();
    assert!(completion.prompt_tokens.unwrap() > 0);
    let failure = say(&model, GenerateRequest::raw("").with_sampling(seeded(1))).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::BadRequest);
}

#[tokio::test]
async fn what_narrows_the_choice_down_to_one_token_gives_the_likeliest_at_any_temperature() {
    let (_file, model) = llama(Model::new(Kind::Llama).endless(true)).await;
    let hot = |seed| Sampling {
        temperature: Some(20.0),
        seed: Some(seed),
        max_tokens: Some(24),
        ..Sampling::default()
    };
    let wide = |seed| Sampling { top_k: Some(0), top_p: Some(1.0), min_p: Some(0.0), ..hot(seed) };
    let greedy = Sampling { temperature: Some(0.0), max_tokens: Some(24), ..Sampling::default() };
    let likeliest = say(&model, chat(greedy)).await.unwrap().0;
    for seed in 0..3 {
        for (what, narrow) in [
            ("top_k", Sampling { top_k: Some(1), ..wide(seed) }),
            ("top_p", Sampling { top_p: Some(1e-6), ..wide(seed) }),
            ("min_p", Sampling { min_p: Some(1.0), ..wide(seed) }),
        ] {
            assert_eq!(say(&model, chat(narrow)).await.unwrap().0, likeliest, "{what}");
        }
        assert_ne!(say(&model, chat(wide(seed))).await.unwrap().0, likeliest);
    }
}

#[tokio::test]
async fn a_files_broken_chat_template_is_told_and_raw_prompts_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (template, said) in [
        ("{% for message in messages %}{{ message.content }", "syntax error"),
        ("{{ raise_exception('no system message, please') }}", "no system message, please"),
        ("{{ messages[0].content.no_such_method() }}", "no_such_method"),
    ] {
        let mut writer = Model::new(Kind::Llama).writer().unwrap();
        writer.set("tokenizer.chat_template", template);
        writer.create(&path).unwrap();
        let model = load(settings(&path, Capability::Generate)).await.unwrap();
        let failure = say(&model, chat(seeded(1))).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadRequest, "{failure}");
        let mut causes = failure.to_string();
        let mut below = std::error::Error::source(&failure);
        while let Some(cause) = below {
            causes += &format!(": {cause}");
            below = cause.source();
        }
        assert!(causes.contains("chat template") && causes.contains(said), "{causes}");
        assert!(say(&model, GenerateRequest::raw("hello").with_sampling(seeded(1))).await.is_ok());
        model.unload().await;
    }
}

//! Conversations that outlive their model's stay in memory.

use std::path::Path;
use std::sync::Arc;

use sarai_agents::llama::{GgufSettings, SessionStore};
use sarai_core::config::Context;
use sarai_core::failure::FailureKind;
use sarai_core::request::{Capability, Completion, GenerateRequest, Message, Sampling};
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model};

use super::{ModelFile, assert_alike, file, kinds, load, say, settings};

fn with_store(file: &ModelFile, folder: &Path, most: Bytes) -> GgufSettings {
    GgufSettings {
        sessions: Some(SessionStore::new(folder, most)),
        ..settings(&file.path, Capability::Generate)
    }
}

const PLENTY: Bytes = Bytes(1 << 30);

fn first_turn() -> Vec<Message> {
    vec![Message::system("the dog and the cat are here and now ".repeat(15)), Message::user("¿Cómo estás?")]
}

fn ask(messages: &[Message]) -> GenerateRequest {
    let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(12), ..Sampling::default() };
    GenerateRequest::chat(messages.to_vec()).with_sampling(sampling).with_logprobs(2)
}

/// Loads, asks, and unloads.
async fn visit(settings: GgufSettings, messages: &[Message]) -> (String, Completion) {
    let model = load(settings).await.unwrap();
    let said = say(&model, ask(messages)).await.unwrap();
    model.unload().await;
    said
}

fn files(folder: &Path, end: &str) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|own| own == end)).collect();
    files.sort();
    files
}

fn second(said: &str) -> Vec<Message> {
    let mut messages = first_turn();
    messages.extend([Message::assistant(said), Message::user("¿Y tú?")]);
    messages
}

async fn second_turn(settings: GgufSettings, said: &str) -> (String, Completion) {
    visit(settings, &second(said)).await
}

#[tokio::test]
async fn a_conversation_goes_on_after_a_reload_without_being_read_again_and_says_the_same() {
    for kind in kinds() {
        let file = file(&Model::new(kind.clone()).endless(true));
        let folder = tempfile::tempdir().unwrap();
        let kept = || with_store(&file, folder.path(), PLENTY);
        let (said, first) = visit(kept(), &first_turn()).await;
        let (_, warm) = second_turn(kept(), &said).await;
        let (_, cold) = second_turn(settings(&file.path, Capability::Generate), &said).await;
        assert_alike(&cold, &warm, &format!("{kind:?}"));
        assert_eq!(cold.cached_tokens, Some(0));
        assert!(warm.cached_tokens.unwrap() + 1 >= first.prompt_tokens.unwrap(), "{kind:?} {warm:?}");
    }
}

#[tokio::test]
async fn what_is_damaged_or_anothers_is_not_used_and_changes_nothing() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let folder = tempfile::tempdir().unwrap();
    let kept = || with_store(&file, folder.path(), PLENTY);
    let (said, _) = visit(kept(), &first_turn()).await;
    let (_, expected) = second_turn(settings(&file.path, Capability::Generate), &said).await;
    let intact: Vec<(std::path::PathBuf, Vec<u8>)> = files(folder.path(), "kv")
        .into_iter()
        .chain(files(folder.path(), "json"))
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    assert!(intact.len() >= 2, "{intact:?}");
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 4] = [
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes.clear(),
        |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x55;
        },
        |bytes| bytes.extend([0; 100]),
    ];
    for damage in damages {
        for (path, content) in &intact {
            files(folder.path(), "kv")
                .iter()
                .chain(&files(folder.path(), "json"))
                .for_each(|path| std::fs::remove_file(path).unwrap());
            intact.iter().for_each(|(path, content)| std::fs::write(path, content).unwrap());
            let mut damaged = content.clone();
            damage(&mut damaged);
            std::fs::write(path, damaged).unwrap();
            let (_, again) = second_turn(kept(), &said).await;
            assert_alike(&expected, &again, &path.display().to_string());
        }
    }
    // A description that tells of other tokens than the state has.
    for (path, content) in &intact {
        std::fs::write(path, content).unwrap();
    }
    for path in files(folder.path(), "json") {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut description: serde_json::Value = serde_json::from_str(&text).unwrap();
        let last = description["tokens"].as_array().unwrap().len() - 1;
        description["tokens"][last] = description["tokens"][0].clone();
        std::fs::write(&path, description.to_string()).unwrap();
    }
    assert_alike(&expected, &second_turn(kept(), &said).await.1, "other tokens");
    // The same conversation with another model of the same shape.
    let other = super::file(&Model::new(Kind::Llama).endless(true).seed(9));
    let (_, foreign) = visit(with_store(&other, folder.path(), PLENTY), &first_turn()).await;
    assert_eq!(foreign.cached_tokens, Some(0));
}

#[tokio::test]
async fn what_cannot_be_read_goes_and_what_is_none_of_the_stores_stays() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let folder = tempfile::tempdir().unwrap();
    let kept = || with_store(&file, folder.path(), PLENTY);
    let (said, _) = visit(kept(), &first_turn()).await;
    for (name, content) in [("damaged.json", "{"), ("damaged.kv", "x"), ("notes.txt", "mine")] {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let (_, warm) = second_turn(kept(), &said).await;
    assert!(warm.cached_tokens.unwrap() > 0);
    assert!(!folder.path().join("damaged.json").exists() && !folder.path().join("damaged.kv").exists());
    assert!(folder.path().join("notes.txt").exists());
}

#[tokio::test]
async fn two_engines_on_one_store_see_what_the_other_writes() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let folder = tempfile::tempdir().unwrap();
    let kept = || with_store(&file, folder.path(), PLENTY);
    let (one, two) = (load(kept()).await.unwrap(), load(kept()).await.unwrap());
    let first = say(&one, ask(&first_turn())).await.unwrap();
    say(&two, ask(&first_turn())).await.unwrap();
    // Both write the same conversation at the same time.
    tokio::join!(one.unload(), two.unload());
    assert!(files(folder.path(), "part").is_empty());
    let before = load(kept()).await.unwrap();
    let (_, warm) = second_turn(kept(), &first.0).await;
    assert!(warm.cached_tokens.unwrap() + 1 >= first.1.prompt_tokens.unwrap(), "{warm:?}");
    // This one was there before the second turn was written.
    let (_, again) = say(&before, ask(&second(&first.0))).await.unwrap();
    assert!(again.cached_tokens.unwrap() + 1 >= warm.prompt_tokens.unwrap(), "{again:?}");
}

#[tokio::test]
async fn the_store_stays_within_its_size_and_the_newest_stay() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let folder = tempfile::tempdir().unwrap();
    let turns =
        |n: usize| vec![Message::user(format!("{n} {}", "the dog and the cat are here and now ".repeat(15)))];
    visit(with_store(&file, folder.path(), PLENTY), &turns(0)).await;
    let one: u64 = files(folder.path(), "kv").iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(one > 0);
    let most = Bytes(one * 5 / 2);
    for n in 1..6 {
        visit(with_store(&file, folder.path(), most), &turns(n)).await;
        let both = files(folder.path(), "kv").into_iter().chain(files(folder.path(), "json"));
        let held: u64 = both.map(|path| path.metadata().unwrap().len()).sum();
        assert!(held <= most.0, "{held} of {most}");
    }
    assert_eq!(files(folder.path(), "kv").len(), files(folder.path(), "json").len());
    let (_, newest) = visit(with_store(&file, folder.path(), most), &turns(5)).await;
    assert!(newest.cached_tokens.unwrap() > 0);
    // One that no session fits into keeps none, and works.
    let small = tempfile::tempdir().unwrap();
    visit(with_store(&file, small.path(), Bytes(10)), &turns(0)).await;
    assert!(files(small.path(), "kv").is_empty());
}

#[tokio::test]
async fn a_store_that_cannot_be_written_to_harms_nothing() {
    let file = file(&Model::new(Kind::Llama));
    let folder = tempfile::tempdir().unwrap();
    let not_a_folder = folder.path().join("file");
    std::fs::write(&not_a_folder, "x").unwrap();
    let settings = with_store(&file, &not_a_folder.join("sessions"), PLENTY);
    let (_, completion) = visit(settings, &first_turn()).await;
    assert!(completion.prompt_tokens.unwrap() > 100);
}

#[tokio::test]
async fn what_leaves_the_context_for_others_comes_back_from_disk() {
    let file = file(&Model::new(Kind::Llama).endless(true));
    let folder = tempfile::tempdir().unwrap();
    let model = load(with_store(&file, folder.path(), PLENTY)).await.unwrap();
    let about =
        |n: usize| vec![Message::user(format!("{n} {}", "the dog and the cat are here and now ".repeat(15)))];
    let first = say(&model, ask(&about(0))).await.unwrap();
    // Others that fill the context of 512 tokens several times over.
    for n in 1..8 {
        say(&model, ask(&about(n))).await.unwrap();
    }
    let again = say(&model, ask(&about(0))).await.unwrap();
    assert_alike(&first.1, &again.1, "from disk");
    assert_eq!(again.1.cached_tokens.unwrap() + 1, first.1.prompt_tokens.unwrap());
    let _model: Arc<dyn sarai_core::backend::Model> = model;
}

#[tokio::test]
async fn a_conversation_goes_on_in_a_shorter_and_in_a_longer_context() {
    for kind in kinds() {
        let file = file(&Model::new(kind.clone()).endless(true).n_ctx_train(4096));
        let folder = tempfile::tempdir().unwrap();
        let context = Context::Fixed(1024);
        let kept = GgufSettings { context, ..with_store(&file, folder.path(), PLENTY) };
        let model = load(kept).await.unwrap();
        let mut messages = first_turn();
        messages[0] = Message::system("the dog and the cat are here and now ".repeat(42));
        let (said, first) = say(&model, ask(&messages)).await.unwrap();
        assert!(first.prompt_tokens.unwrap() > 512, "{first:?}");
        messages.extend([Message::assistant(said.as_str()), Message::user("¿Y tú?")]);
        let fresh = GgufSettings { context, ..settings(&file.path, Capability::Generate) };
        let (_, expected) = visit(fresh, &messages).await;
        for n_ctx in [768, 2048] {
            model.resize(n_ctx).await.unwrap();
            assert_eq!(model.n_ctx(), Some(n_ctx));
            let (_, goes_on) = say(&model, ask(&messages)).await.unwrap();
            assert_alike(&expected, &goes_on, &format!("{kind:?} {n_ctx}"));
            assert!(goes_on.cached_tokens.unwrap() + 1 >= first.prompt_tokens.unwrap(), "{goes_on:?}");
        }
        // What no longer fits is said so, and the conversation waits for a longer context.
        model.resize(512).await.unwrap();
        assert_eq!(say(&model, ask(&messages)).await.unwrap_err().kind, FailureKind::ContextOverflow);
        model.resize(1024).await.unwrap();
        let (_, again) = say(&model, ask(&messages)).await.unwrap();
        assert_alike(&expected, &again, &format!("{kind:?}"));
        assert!(again.cached_tokens.unwrap() + 1 >= first.prompt_tokens.unwrap(), "{again:?}");
        model.unload().await;
        assert_eq!(model.resize(768).await.unwrap_err().kind, FailureKind::EngineGone);
    }
}

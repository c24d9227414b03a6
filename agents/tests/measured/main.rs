//! What loads really take, remembered for the next time. In a process of its own: memory that something else takes
//! meanwhile is nobody's.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use sarai_agents::llama::{GgufBackend, GgufSettings};
use sarai_core::backend::{Backend, LoadRequest, Model as Loaded};
use sarai_core::config::{Context, KvCacheType, Weights};
use sarai_core::memory::{Estimate, Footprint};
use sarai_core::request::{Capability, GenerateRequest, Message, Sampling};
use sarai_core::units::Bytes;
use sarai_support::gguf::{Kind, Model, Projector};

async fn estimate(settings: &GgufSettings) -> Estimate {
    GgufBackend::new(settings.clone()).estimate(Bytes::from_gb(8.0)).await.unwrap()
}

async fn load(settings: &GgufSettings) -> Arc<dyn Loaded> {
    load_with(settings, |_| {}).await
}

async fn load_with(
    settings: &GgufSettings,
    progress: impl Fn(f32) + Send + Sync + 'static,
) -> Arc<dyn Loaded> {
    let request = LoadRequest { progress: Arc::new(progress), ..LoadRequest::new(estimate(settings).await) };
    GgufBackend::new(settings.clone()).load(request).await.unwrap()
}

/// One test at a time: what is measured is the whole process's.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Reads three texts, none of which begins like another: the first steps may be small until the pace is known.
async fn read(model: &dyn Loaded, words: usize) {
    for first in ["dog", "cat", "and"] {
        let sampling = Sampling { max_tokens: Some(1), ..Sampling::default() };
        let text = format!("{first} {}", "the dog ".repeat(words));
        let request = GenerateRequest::raw(text).with_sampling(sampling);
        let deltas: Vec<_> = model.generate(request).await.unwrap().collect().await;
        assert!(deltas.iter().all(Result::is_ok));
    }
}

/// With a context so short that the smallest steps which a busy machine comes down to are half of the largest.
fn settings(file: &Path, folder: &Path) -> GgufSettings {
    GgufSettings {
        measurements: Some(folder.to_owned()),
        context: Context::Fixed(256),
        weights: Weights::Repack,
        ..GgufSettings::new(file, Capability::Generate)
    }
}

#[tokio::test]
async fn what_a_load_took_is_remembered_once_all_of_it_was_in_use() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    Model::new(Kind::Llama).n_embd(512).n_head(8).n_head_kv(8).n_ff(2048).n_layer(6).write_to(&file).unwrap();
    let settings = settings(&file, folder.path());
    let first = estimate(&settings).await;
    assert_eq!((first.measured_before, first.load_time), (None, None));
    assert_eq!(first.reserve(), first.total());

    // A few tokens do not show what a long prompt takes.
    let model = load(&settings).await;
    read(&*model, 3).await;
    model.unload().await;
    let second = estimate(&settings).await;
    assert_eq!(second.measured_before, None);
    assert!(second.load_time.unwrap() < Duration::from_mins(1));

    let model = load(&settings).await;
    let at_load = model.memory().unwrap().total().unwrap();
    read(&*model, 100).await;
    let in_use = model.memory().unwrap().total().unwrap();
    assert!(in_use > at_load + Bytes(1_000_000), "{at_load} {in_use}");
    let returned = model.unload().await.unwrap();
    assert_eq!((returned.held, returned.shortfall()), (in_use, None), "{returned:?}");
    assert!(returned.returned.0 as f64 > 0.95 * in_use.0 as f64, "{returned:?}");
    let third = estimate(&settings).await;
    assert_eq!(third.measured_before, Some(in_use));
    assert_eq!((third.reserve(), third.total()), (in_use + third.spare, first.total()));
    assert!(third.spare > Bytes(8_000_000) && third.spare.0 < 8_500_000 + in_use.0 / 100, "{}", third.spare);

    // What cannot be read, as from another version, does not count, and is written anew.
    for damage in ["{", "[1]", r#"{"key": 1}"#] {
        std::fs::write(folder.path().join("loads.json"), damage).unwrap();
        assert_eq!(estimate(&settings).await.measured_before, None);
        load(&settings).await.unload().await;
        assert!(estimate(&settings).await.load_time.is_some(), "{damage}");
    }

    // Another context is another load.
    let other = GgufSettings { context: Context::Fixed(1024), ..settings.clone() };
    assert_eq!(estimate(&other).await.measured_before, None);
}

#[tokio::test]
async fn what_a_shorter_context_frees_is_measured() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    Model::new(Kind::Llama).n_embd(512).n_head(8).n_head_kv(8).n_ff(2048).n_layer(6).write_to(&file).unwrap();
    let short = settings(&file, folder.path());
    let long = GgufSettings { context: Context::Fixed(2048), ..short.clone() };
    // Compute buffers are touched later, by steps.
    let saves = (estimate(&long).await.kv - estimate(&short).await.kv).0 as f64;
    let model = load(&long).await;
    let before = model.memory_at_load().unwrap().total().unwrap();
    model.resize(256).await.unwrap();
    let after = model.memory_at_load().unwrap().total().unwrap();
    let saved = before.0 as f64 - after.0 as f64;
    assert!((0.8..1.25).contains(&(saved / saves)), "{saved} saved of {saves}");
    read(&*model, 100).await;
    let in_use = model.memory().unwrap().total().unwrap();
    let freed = model.unload().await.unwrap();
    assert_eq!((freed.held, freed.shortfall()), (in_use, None), "{freed:?}");
    let remembered = estimate(&short).await;
    assert_eq!((remembered.measured_before, remembered.load_time), (Some(in_use), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_loads_at_once_have_their_parts_of_what_both_took() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let (large, helper) = (folder.path().join("large.gguf"), folder.path().join("helper.gguf"));
    Model::new(Kind::Llama).n_embd(1024).n_head(16).n_ff(4096).n_layer(4).write_to(&large).unwrap();
    Model::new(Kind::BertEmbedding).n_embd(1024).n_head(16).n_ff(4096).n_layer(2).write_to(&helper).unwrap();
    let (remembers, large) = (settings(&large, folder.path()), settings(&large, folder.path()));
    let large = GgufSettings { measurements: None, ..large };
    let helper = GgufSettings {
        context: Context::Fixed(64),
        weights: Weights::Repack,
        ..GgufSettings::new(&helper, Capability::Embed)
    };
    let anonymous = |model: &Arc<dyn Loaded>| model.memory_at_load().unwrap().anonymous;
    let mut alone = Vec::new();
    for settings in [&large, &helper] {
        let model = load(settings).await;
        alone.push(anonymous(&model).unwrap().0 as f64);
        model.unload().await;
    }
    // The large one is held at its beginning until the helper is there.
    let (there, is_there) = std::sync::mpsc::sync_channel::<()>(1);
    let is_there = std::sync::Mutex::new(is_there);
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let begun = std::sync::Mutex::new(Some(begun));
    let hold = move |_| {
        if let Some(begun) = begun.lock().unwrap().take() {
            begun.send(()).unwrap();
            is_there.lock().unwrap().recv().unwrap();
        }
    };
    let (first, second) = tokio::join!(load_with(&remembers, hold), async {
        has_begun.await.unwrap();
        let helper = load(&helper).await;
        assert_eq!(anonymous(&helper), None, "nobody knows yet whose is what");
        there.send(()).unwrap();
        helper
    });
    let together = [&first, &second].map(|model| anonymous(model).unwrap().0 as f64);
    for (name, alone, beside) in [("large", alone[0], together[0]), ("helper", alone[1], together[1])] {
        assert!((0.85..1.15).contains(&(beside / alone)), "{name}: {alone} alone, {beside} beside the other");
    }
    // Said as what it is, and not remembered as measured.
    read(&*first, 100).await;
    assert!(!first.memory().unwrap().exact && !second.memory_at_load().unwrap().exact);
    assert_eq!(first.unload().await, None, "nobody knows what should come back");
    let next = estimate(&remembers).await;
    assert!(next.measured_before.is_none() && next.load_time.is_some(), "{next:?}");
}

#[tokio::test]
async fn what_steps_add_belongs_to_what_a_model_holds() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    Model::new(Kind::Llama).n_embd(512).n_head(8).n_head_kv(8).n_ff(2048).n_layer(6).write_to(&file).unwrap();
    let model = load(&settings(&file, folder.path())).await;
    let before = model.memory_at_load().unwrap();
    read(&*model, 100).await;
    let after = model.memory_at_load().unwrap();
    assert!(before.exact && after.exact);
    assert!(after.anonymous.unwrap() > before.anonymous.unwrap() + Bytes(1_000_000), "{before:?} {after:?}");
    assert_eq!(Footprint { file_backed: after.file_backed, ..model.memory().unwrap() }, after);
}

#[tokio::test]
async fn of_a_mapped_file_all_of_it_is_remembered() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    Model::new(Kind::Llama).n_embd(512).n_head(8).n_head_kv(8).n_ff(2048).n_layer(6).write_to(&file).unwrap();
    let settings = GgufSettings { weights: Weights::Mmap, ..settings(&file, folder.path()) };
    let expected = estimate(&settings).await;
    let model = load(&settings).await;
    read(&*model, 100).await;
    let own = model.memory().unwrap().anonymous.unwrap();
    let freed = model.unload().await.unwrap();
    assert_eq!(freed.shortfall(), None, "{freed:?}");
    // Its last page is a whole one.
    let remembered = estimate(&settings).await.measured_before.unwrap();
    let all = expected.weights + own;
    assert!(remembered >= all && remembered <= all + Bytes(1 << 16), "{remembered} {all}");
}

#[tokio::test]
async fn a_model_that_reads_short_texts_is_remembered_with_room_for_long_ones() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    Model::new(Kind::BertEmbedding).n_ctx_train(2048).write_to(&file).unwrap();
    let settings = GgufSettings {
        measurements: Some(folder.path().to_owned()),
        context: Context::Fixed(2048),
        weights: Weights::Repack,
        ..GgufSettings::new(&file, Capability::Embed)
    };
    let expected = estimate(&settings).await;
    let embed = async |texts: usize, words: usize| {
        let model = load(&settings).await;
        let at_load = model.memory_at_load().unwrap().total().unwrap();
        model.embed(vec!["the dog ".repeat(words); texts]).await.unwrap();
        model.unload().await;
        (at_load, estimate(&settings).await.measured_before)
    };
    assert_eq!(embed(1, 10).await.1, None, "too little was in use");
    let (at_load, remembered) = embed(16, 60).await;
    let remembered = remembered.expect("full steps of texts that share them");
    assert!(remembered >= at_load + expected.compute, "{remembered} {at_load} {expected:?}");
}

#[tokio::test]
async fn keys_and_values_of_every_type_take_what_they_are_estimated_at() {
    use KvCacheType::{Bf16, F16, F32, Iq4Nl, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let model = Model::new(Kind::Llama).n_embd(512).n_head(8).n_head_kv(8).n_ff(512).n_layer(6);
    model.n_ctx_train(8192).write_to(&file).unwrap();
    let mut found = Vec::new();
    for kv_cache_type in [F32, F16, Bf16, Q8_0, Q5_1, Q5_0, Q4_1, Iq4Nl, Q4_0] {
        let context = Context::Fixed(8192);
        let settings =
            GgufSettings { kv_cache_type, context, measurements: None, ..settings(&file, folder.path()) };
        let estimated = estimate(&settings).await.kv;
        let model = load(&settings).await;
        found.push((kv_cache_type, estimated, model.memory_at_load().unwrap().anonymous.unwrap()));
        model.unload().await;
    }
    // What is the same for all falls out of the difference to the largest.
    let (_, most_estimated, most) = found[0];
    for (kind, estimated, measured) in &found[1..] {
        let ratio = (most - *measured).0 as f64 / (most_estimated - *estimated).0 as f64;
        assert!((0.9..1.1).contains(&ratio), "{kind:?}: {ratio:.3} of {found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_beside_a_model_that_writes_is_measured() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let (writes, loads) = (folder.path().join("writes.gguf"), folder.path().join("loads.gguf"));
    Model::new(Kind::Llama).endless(true).write_to(&writes).unwrap();
    Model::new(Kind::Llama).n_embd(512).n_head(8).n_ff(2048).n_layer(4).write_to(&loads).unwrap();
    let loads = GgufSettings { measurements: None, ..settings(&loads, folder.path()) };
    let model = load(&loads).await;
    let alone = model.memory_at_load().unwrap().anonymous.unwrap().0 as f64;
    model.unload().await;
    let writer = load(&GgufSettings { measurements: None, ..settings(&writes, folder.path()) }).await;
    let mut stream = writer.generate(GenerateRequest::raw("the dog")).await.unwrap();
    // Its steps are of one token by now.
    for _ in 0..4 {
        stream.next().await.unwrap().unwrap();
    }
    let beside = load(&loads).await.memory_at_load().unwrap().anonymous.unwrap().0 as f64;
    stream.next().await.unwrap().unwrap();
    assert!((0.85..1.15).contains(&(beside / alone)), "{alone} alone, {beside} beside a model that writes");
}

/// A model that sees and hears, with its projector.
fn seeing(folder: &Path) -> GgufSettings {
    let (file, mmproj) = (folder.join("model.gguf"), folder.join("mmproj.gguf"));
    Model::new(Kind::Qwen2Vl).write_to(&file).unwrap();
    Projector::new(192).write_to(&mmproj).unwrap();
    GgufSettings { context: Context::Fixed(2048), mmproj: Some(mmproj), ..settings(&file, folder) }
}

/// Asks about a picture with this many pixels a side.
async fn look(model: &dyn Loaded, side: u32) {
    let picture = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([x as u8, y as u8, 9]));
    let mut file = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut file, image::ImageFormat::Png).unwrap();
    let picture = sarai_core::image::Image::new(file.into_inner()).unwrap();
    let sampling = Sampling { max_tokens: Some(1), ..Sampling::default() };
    let question = Message::user("What is this?").with_images(vec![picture]);
    let request = GenerateRequest::chat(vec![question]).with_sampling(sampling);
    let deltas: Vec<_> = model.generate(request).await.unwrap().collect().await;
    assert!(deltas.iter().all(Result::is_ok), "{deltas:?}");
}

#[tokio::test]
async fn a_projector_is_in_the_estimate_and_in_what_is_held() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let settings = seeing(folder.path());
    let blind = GgufSettings { mmproj: None, ..settings.clone() };
    let (with, without) = (estimate(&settings).await, estimate(&blind).await);
    let file = std::fs::metadata(settings.mmproj.as_ref().unwrap()).unwrap().len();
    assert!(with.projector >= Bytes(file / 10 * 9) && without.projector == Bytes::ZERO, "{with:?}");
    assert_eq!(with.total().saturating_sub(with.projector), without.total());
    let held = |model: &Arc<dyn Loaded>| model.memory().unwrap().anonymous.unwrap();
    let model = load(&blind).await;
    let without = held(&model);
    model.unload().await;
    let model = load(&settings).await;
    let more = held(&model).saturating_sub(without);
    assert!(more >= Bytes(file / 10 * 9), "{more} for a file of {file}");
    look(&*model, 600).await;
    let all = model.memory().unwrap().total().unwrap();
    assert!(all <= with.total(), "{all} of {}", with.total());
    assert_eq!(model.unload().await.unwrap().shortfall(), None);
}

#[tokio::test]
async fn an_idle_projector_gives_its_memory_back_and_sees_again_when_asked() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().unwrap();
    let settings = GgufSettings { projector_ttl: Some(Duration::from_millis(1)), ..seeing(folder.path()) };
    let held = |model: &Arc<dyn Loaded>| model.memory().unwrap().anonymous.unwrap();
    let model = load(&settings).await;
    look(&*model, 200).await;
    let reserved = model.memory_at_load().unwrap().anonymous.unwrap();
    let began = Instant::now();
    while held(&model) >= reserved {
        assert!(began.elapsed() < Duration::from_secs(20), "it keeps {}", held(&model));
        tokio::task::yield_now().await;
    }
    assert_eq!(model.memory_at_load().unwrap().anonymous, Some(reserved), "its room stays its own");
    look(&*model, 201).await;
    model.unload().await;
}

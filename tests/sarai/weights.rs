//! Weights that several models share, in the real pool.

use sarai::Sarai;
use sarai::core::config::{self, Env, Overrides};
use sarai_support::gguf::{Kind, Model};

use super::Site;

#[tokio::test(flavor = "multi_thread")]
async fn models_on_one_file_have_its_weights_once_however_they_are_loaded() {
    let site = Site::new();
    site.model("one", &Model::new(Kind::Llama).n_embd(512).n_head(8).n_ff(2048).n_layer(6));
    let file = "backend: gguf_native, path: models/demo/one.gguf, weights: repack, context: 512, parallel: 1";
    let text = format!(
        "models:\n  llm: {{{file}}}\n  twin: {{{file}}}\n  helper: {{{file}, role: embedding, class: on_demand}}\n\
         memory: {{max_ram_gb: 2}}\nsessions: {{max_gb: 0}}\n"
    );
    let path = site.path("sarai.yaml");
    let resolved = config::parse(&text, Some(&path), &Env::default(), &Overrides::default()).unwrap();
    let sarai = Sarai::start(&resolved.config).unwrap();
    // Side by side: LLMs and helpers do not wait for each other's loads.
    let (llm, helper) = tokio::join!(sarai.pool().load("llm"), sarai.pool().load("helper"));
    llm.unwrap();
    helper.unwrap();
    sarai.pool().load("twin").await.unwrap();
    let usage = sarai.pool().memory_usage().await.unwrap();
    let weights = usage.models[0].estimate.as_ref().unwrap().weights.0;
    let alone: u64 = usage.models.iter().map(|model| model.estimated_bytes.unwrap().0).sum();
    assert!(usage.models.iter().all(|model| model.state == "ready"));
    assert!(
        usage.used_bytes.0 + 2 * weights < alone + weights / 4,
        "{} of {alone}, {weights}",
        usage.used_bytes
    );
    // The last one was loaded alone, so that what it took is known.
    if cfg!(target_os = "linux") {
        let twin = usage.models.iter().find(|model| model.model.as_str() == "twin").unwrap();
        let own = twin.measured.unwrap().anonymous.unwrap();
        assert!(own.0 < weights / 2, "{own} of {weights}");
    }
}

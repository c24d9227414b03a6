use std::time::Duration;

use sarai_core::answer::OnStreamFailure;
use sarai_core::config::{
    Budget, Class, Context, GgufConfig, HostKind, KvCacheType, ModelRole, OnHost, Place, RouterKind,
    StepAction, Strategy, Weights,
};
use sarai_core::units::Bytes;

use super::{MODELS, accepted, accepted_in, env, model};

const SEED: &str = r#"
models:
  solar: {backend: "ollama_http", fallback: "gguf_native"}
  lfm2:  {backend: "gguf_native"}
  omni:  {backend: "gguf_native"}
memory:
  max_ram_gb: 12
  max_concurrent_llms: 3
  strategy: "hybrid_http_gguf"
"#;

const SPELLED_OUT: &str = r#"
hosts:
  lan: {kind: ollama, url: "${OLLAMA_BASE_URL:-http://127.0.0.1:11434}", max_ram_gb: 16}
models:
  embedding: {role: embedding, class: resident, backend: gguf_native, path: models/embeddinggemma-300m-q8_0.gguf}
  router:    {role: router, class: resident, kind: similarity, model: embedding, labels: {hard: ["..."], soft: ["..."]}}
  solar:
    backend: ollama_http
    fallback: gguf_native            # or a list: [gguf_native, lfm2]
    host: lan                        # or a list
    host_model: "${SOLAR_MODEL_NAME:-solar:10.7b}"
    path: models/solar-10.7b-instruct-v1.0.Q4_K_M.gguf
    context: auto                    # N, or {min: 1000, max: 8000}
    weights: auto                    # mmap | repack
  lfm2: {backend: gguf_native, class: preferred, path: models/LFM2-1.2B-Q4_K_M.gguf, ttl: 45s}
  omni: {backend: gguf_native, path: models/Qwen2.5-Omni-7B-Q4_K_M.gguf, mmproj: models/mmproj-Qwen2.5-Omni-7B-f16.gguf}
memory: {max_ram_gb: 12, max_concurrent_llms: 3, strategy: hybrid_http_gguf, monitor_interval: 30s}   # or preset: medium
metrics: {listen: "127.0.0.1:9464"}
"#;

fn gguf(path: &str) -> Place {
    let context = Context::Auto { min: 1000, max: 8000 };
    Place::Gguf(GgufConfig {
        path: path.into(),
        context,
        weights: Weights::Auto,
        kv_cache_type: KvCacheType::F16,
        threads: None,
        parallel: None,
        lora: Vec::new(),
        mmproj: None,
        projector_ttl: None,
    })
}

fn ollama(host: &str, model: &str) -> Place {
    let hosts = vec![on(host, model)];
    Place::Hosts { kind: HostKind::Ollama, hosts, n_ctx: None }
}

fn on(host: &str, model: &str) -> OnHost {
    OnHost { host: host.parse().expect("a name"), model: model.to_owned() }
}

#[test]
fn the_shortest_configuration_takes_conventional_files_and_the_conventional_host() {
    let resolved = accepted(SEED);
    let solar = model(&resolved, "solar");
    assert_eq!(solar.places, [ollama("ollama", "solar"), gguf("config/models/solar.gguf")]);
    assert_eq!((solar.role, solar.class, solar.ttl), (ModelRole::Llm, Class::OnDemand, None));
    assert_eq!(model(&resolved, "lfm2").places, [gguf("config/models/lfm2.gguf")]);
    let config = &resolved.config;
    assert_eq!(config.hosts[&"ollama".parse().unwrap()].url, "http://127.0.0.1:11434");
    assert_eq!(config.memory.budget, Budget::Of(Bytes::from_gb(12.0)));
    assert_eq!(config.memory.max_concurrent_llms, 3);
    assert_eq!(config.memory.strategy, Strategy::HybridHttpGguf);
    assert_eq!(config.memory.monitor_interval, Duration::from_secs(30));
    assert_eq!(config.queue.max_waiting, 256);
    assert_eq!(config.queue.wait_timeout, Duration::from_secs(300));
    assert!(config.metrics.is_none() && config.router.is_none() && config.pipelines.is_empty());
    assert_eq!(resolved.warnings, []);
}

#[test]
fn the_spelled_out_configuration_is_taken_word_for_word() {
    let resolved = accepted(SPELLED_OUT);
    let config = &resolved.config;
    let lan = &config.hosts[&"lan".parse().unwrap()];
    assert_eq!((lan.url.as_str(), lan.max_ram), ("http://127.0.0.1:11434", Some(Bytes::from_gb(16.0))));
    assert_eq!(config.hosts.len(), 1, "a host that nobody uses is not made up");
    let solar_file = gguf("config/models/solar-10.7b-instruct-v1.0.Q4_K_M.gguf");
    assert_eq!(model(&resolved, "solar").places, [ollama("lan", "solar:10.7b"), solar_file]);
    let lfm2 = model(&resolved, "lfm2");
    assert_eq!((lfm2.class, lfm2.ttl), (Class::Preferred, Some(Duration::from_secs(45))));
    assert_eq!(model(&resolved, "embedding").class, Class::Resident);
    let Place::Gguf(omni) = &model(&resolved, "omni").places[0] else { panic!("a file") };
    assert_eq!(omni.mmproj.as_deref(), Some("config/models/mmproj-Qwen2.5-Omni-7B-f16.gguf".as_ref()));
    assert_eq!(config.metrics.as_ref().unwrap().listen, "127.0.0.1:9464".parse().unwrap());
    assert_eq!(resolved.warnings, []);
}

#[test]
fn a_similarity_router_is_not_a_model_that_can_be_loaded() {
    let resolved = accepted(SPELLED_OUT);
    let router = resolved.config.router.as_ref().unwrap();
    let RouterKind::Similarity { model, labels } = &router.kind else { panic!("{router:?}") };
    assert_eq!(model.as_str(), "embedding");
    assert_eq!(labels.keys().collect::<Vec<_>>(), ["hard", "soft"]);
    assert!(!resolved.config.models.contains_key(&"router".parse().unwrap()));
}

#[test]
fn a_classifier_is_a_router_and_a_model() {
    let router = "  judge: {role: router, kind: classifier, backend: gguf_native, routes: {hard: solar}, default: lfm2, threshold: 0.4}";
    let resolved = accepted(&format!("{MODELS}{router}"));
    let judge = model(&resolved, "judge");
    assert_eq!((judge.role, judge.class), (ModelRole::Router, Class::Resident));
    let router = resolved.config.router.as_ref().unwrap();
    assert_eq!(router.kind, RouterKind::Classifier { model: "judge".parse().unwrap() });
    assert_eq!(router.routes["hard"].as_str(), "solar");
    assert_eq!(router.default.as_ref().unwrap().as_str(), "lfm2");
    assert!((router.threshold - 0.4).abs() < 1e-6);
}

#[test]
fn hosts_and_fallbacks_become_places_in_their_order() {
    let resolved = accepted(
        "
hosts:
  one: {url: 'http://one:1'}
  two: {url: 'http://two:2/'}
models:
  expert: {backend: ollama_http, host: [two, one], host_model: big, context: 4096, fallback: [gguf_native, small]}
  small: {backend: gguf_native, context: {max: 500}}
",
    );
    let hosts = vec![on("two", "big"), on("one", "big")];
    let places = &model(&resolved, "expert").places;
    assert_eq!(places[0], Place::Hosts { kind: HostKind::Ollama, hosts, n_ctx: Some(4096) });
    assert!(matches!(&places[1], Place::Gguf(file) if file.context == Context::Fixed(4096)), "{places:?}");
    assert_eq!(places[2], Place::Model("small".parse().unwrap()));
    assert_eq!(resolved.config.hosts[&"two".parse().unwrap()].url, "http://two:2");
    let Place::Gguf(small) = &model(&resolved, "small").places[0] else { panic!() };
    assert_eq!(small.context, Context::Auto { min: 500, max: 500 }, "the default minimum gives way");
}

#[test]
fn hosts_of_two_kinds_are_two_places_and_each_may_have_its_own_name_for_the_model() {
    let resolved = accepted_in(
        "
hosts:
  lan: {url: 'http://lan:11434', max_ram_gb: 6, watch_interval: 5s}
  gpu: {kind: openai, url: 'http://gpu:8000/v1/', api_key_env: GPU_KEY, continues: true, load_timeout: 1m}
models:
  solar:
    backend: openai_http
    fallback: [ollama_http, gguf_native]
    host: [lan, gpu]
    host_model: {gpu: upstage/SOLAR-10.7B, lan: 'solar:10.7b'}
    on_stream_failure: continue
    hedge_after: 8s
memory: {restore: true}
",
        &env(&[("GPU_KEY", "sk-1234")], &[]),
    );
    let solar = model(&resolved, "solar");
    let gpu =
        Place::Hosts { kind: HostKind::Openai, hosts: vec![on("gpu", "upstage/SOLAR-10.7B")], n_ctx: None };
    assert_eq!(solar.places[..2], [gpu, ollama("lan", "solar:10.7b")]);
    assert_eq!(solar.on_stream_failure, OnStreamFailure::Continue);
    assert_eq!(solar.hedge_after, Some(Duration::from_secs(8)));
    let config = &resolved.config;
    let (lan, gpu) = (&config.hosts[&"lan".parse().unwrap()], &config.hosts[&"gpu".parse().unwrap()]);
    assert_eq!((lan.max_ram, lan.watch_interval), (Some(Bytes::from_gb(6.0)), Some(Duration::from_secs(5))));
    assert_eq!((gpu.url.as_str(), gpu.kind, gpu.continues), ("http://gpu:8000", HostKind::Openai, true));
    assert_eq!(gpu.api_key.as_ref().unwrap().expose(), "sk-1234");
    assert_eq!((gpu.load_timeout, gpu.watch_interval), (Duration::from_secs(60), None));
    assert!(config.memory.restore);
    assert!(!format!("{config:?}{}", resolved.render_resolved()).contains("sk-1234"));
}

#[test]
fn an_ollama_on_this_machine_is_watched_by_itself_and_hosts_alone_are_enough() {
    let resolved = accepted(
        "hosts: {here: {url: 'http://127.0.0.1:11434'}, v6: {url: 'http://[::1]:1'}, lan: {url: 'http://lan:1'}}",
    );
    let watched = |name: &str| resolved.config.hosts[&name.parse().unwrap()].watch_interval;
    assert_eq!(watched("here"), Some(Duration::from_secs(30)));
    assert_eq!((watched("v6").is_some(), watched("lan")), (true, None));
}

#[test]
fn a_strategy_leaves_places_out() {
    let places = |strategy: &str, fallback: &str| {
        let text = format!(
            "models: {{solar: {{backend: ollama_http, fallback: {fallback}}}, lfm2: {{backend: gguf_native}}}}\nmemory: {{strategy: {strategy}}}"
        );
        let resolved = accepted(&text);
        (
            model(&resolved, "solar").places.clone(),
            model(&resolved, "lfm2").places.clone(),
            resolved.config.hosts,
        )
    };
    let (solar, lfm2, hosts) = places("http_only", "gguf_native");
    assert_eq!(solar, [ollama("ollama", "solar")]);
    assert_eq!(lfm2, [gguf("config/models/lfm2.gguf")], "a model without a host keeps its file");
    assert_eq!(hosts.len(), 1);
    let (solar, _, hosts) = places("gguf_only", "[lfm2, gguf_native]");
    let lfm2 = Place::Model("lfm2".parse().unwrap());
    assert_eq!(solar, [gguf("config/models/solar.gguf"), lfm2], "another model never comes first");
    assert!(hosts.is_empty());
}

#[test]
fn presets_are_budgets_by_name_and_medium_is_the_default() {
    let budget = |memory: &str| accepted(&format!("{MODELS}{memory}")).config.memory.budget;
    for (preset, gb) in [("low", 2.0), ("medium", 6.0), ("high", 12.0), ("very_high", 24.0)] {
        assert_eq!(budget(&format!("memory: {{preset: {preset}}}")), Budget::Of(Bytes::from_gb(gb)));
    }
    assert_eq!(budget(""), Budget::Of(Bytes::from_gb(6.0)));
    assert_eq!(budget("memory: {max_ram_gb: 1.5}"), Budget::Of(Bytes::from_gb(1.5)));
    let auto = budget("memory: {preset: auto}");
    assert_eq!((auto, auto.bytes(Some(Bytes(4000)))), (Budget::Auto, Bytes(3000)));
}

#[test]
fn a_key_without_a_value_is_a_key_left_out() {
    let resolved = accepted(&format!("{MODELS}memory:\nhosts:\nqueue:\n  max_waiting:\n"));
    assert_eq!(resolved.config.queue.max_waiting, 256);
}

#[test]
fn durations_have_units() {
    let text = format!("{MODELS}queue: {{wait_timeout: 1h}}\nmemory: {{monitor_interval: 500ms}}");
    let config = accepted(&text).config;
    assert_eq!(config.queue.wait_timeout, Duration::from_secs(3600));
    assert_eq!(config.memory.monitor_interval, Duration::from_millis(500));
}

#[test]
fn steps_prompt_modulate_or_route() {
    let resolved = accepted(&format!(
        "{MODELS}
  router: {{role: router, kind: similarity, model: embedding, labels: {{hard: [x]}}}}
pipelines:
  assist:
    input: text
    steps:
      - {{id: pick, route: '{{{{ input.text }}}}'}}
      - {{id: answer, model: '{{{{ pick.model }}}}', prompt: hi, system: short, sampling: {{top_p: 0.9, stop: END}}}}
      - {{id: tone, model: lfm2, modulate: '{{{{ answer.text }}}}', tone: friendly, when: 'pick.label == \"soft\"', needs: pick, timeout: 5s, fallback: sorry}}
"
    ));
    let steps = &resolved.config.pipelines[&"assist".parse().unwrap()].steps;
    assert_eq!(steps[0].action, StepAction::Route { text: "{{ input.text }}".into() });
    let StepAction::Prompt { model, sampling, system, .. } = &steps[1].action else { panic!() };
    assert_eq!((model.as_str(), system.as_deref()), ("{{ pick.model }}", Some("short")));
    assert_eq!((sampling.top_p, sampling.stop.as_slice()), (Some(0.9), ["END".to_owned()].as_slice()));
    assert!(matches!(&steps[2].action, StepAction::Modulate { tone, .. } if tone == "friendly"));
    assert_eq!(steps[2].needs, ["pick".parse().unwrap()]);
    assert_eq!(
        (steps[2].timeout, steps[2].fallback.as_deref()),
        (Some(Duration::from_secs(5)), Some("sorry"))
    );
}

#[test]
fn what_has_no_effect_or_is_open_to_others_is_a_warning() {
    let resolved = accepted(
        "
hosts: {lan: {url: 'http://lan:1'}}
models:
  a: {backend: gguf_native, host: lan, ttl: 5m, class: resident}
  b: {backend: ollama_http}
metrics: {listen: '0.0.0.0:9464'}
",
    );
    let warned: Vec<_> = resolved.warnings.iter().map(|w| (w.line.unwrap(), w.path.as_str())).collect();
    assert_eq!(
        warned,
        [(4, "models.a.ttl"), (4, "models.a.host"), (5, "models.b.host"), (6, "metrics.listen")]
    );
}

#[test]
fn relative_paths_are_beside_the_configuration_first_then_in_the_working_directory() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sarai.yaml");
    // Tests run in the crate's folder, so `Cargo.toml` is there, and `src/lib.rs` too.
    let text = "models:\n  a: {backend: gguf_native, path: Cargo.toml}\n  b: {backend: gguf_native, path: src/lib.rs}\n  c: {backend: gguf_native, path: none.gguf}\n";
    std::fs::write(&file, text).unwrap();
    std::fs::write(folder.path().join("Cargo.toml"), "").unwrap();
    let resolved = sarai_core::config::load(&file, &Default::default(), &Default::default()).unwrap();
    let path = |name: &str| match &model(&resolved, name).places[0] {
        Place::Gguf(file) => file.path.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(path("a"), folder.path().join("Cargo.toml"));
    assert_eq!(path("b"), std::path::Path::new("src/lib.rs"));
    assert_eq!(path("c"), folder.path().join("none.gguf"), "the first place stands where neither has it");
}

#[test]
fn what_a_local_model_shares_and_keeps_can_be_set() {
    let resolved = accepted(
        "models:\n  a: {backend: gguf_native, path: a.gguf, parallel: 2, lora: {kind.gguf: 0.5}}\n  \
         b: {backend: gguf_native, role: reranker}\nsessions: {path: /tmp/kept, max_gb: 0.5}\n",
    );
    let Place::Gguf(file) = &model(&resolved, "a").places[0] else { panic!("a file") };
    assert_eq!(file.parallel, Some(2));
    let lora: Vec<_> = file.lora.iter().map(|(path, scale)| (path.file_name(), *scale)).collect();
    assert_eq!(lora, [(Some("kind.gguf".as_ref()), 0.5)]);
    assert_eq!(model(&resolved, "b").class, Class::Resident);
    let sessions = &resolved.config.sessions;
    assert_eq!(
        (sessions.path.as_deref(), sessions.max_bytes),
        (Some("/tmp/kept".as_ref()), Bytes(500_000_000))
    );
}

#[test]
fn wrong_settings_of_these_are_told_with_their_places() {
    let bad =
        "models:\n  a: {backend: gguf_native, parallel: 65, lora: {x.gguf: .nan}}\nsessions: {max_gb: -1}\n";
    let shown: String = super::problems(bad).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    for part in ["models.a.parallel", "must be from 1 to 64", "models.a.lora", "sessions.max_gb"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

use std::path::PathBuf;
use std::time::Duration;

use sarai_core::config::{self, Env, Origin, Overrides, Place, Source, Variable};
use sarai_core::units::Bytes;

use super::{MODELS, accepted, accepted_in, env, model, parse_in, problems_in};

fn variable(name: &str, origin: Origin) -> Source {
    Source::Variable(Variable { name: name.into(), origin })
}

fn line(line: usize) -> Source {
    Source::File { file: Some(PathBuf::from("config/sarai.yaml")), line, variables: Vec::new() }
}

#[test]
fn a_flag_wins_over_the_environment_over_dotenv_over_the_file_over_the_default() {
    let budget = |file: &str, env: &Env, flag: Option<f64>| {
        let overrides = Overrides { max_ram_gb: flag, ..Overrides::default() };
        let text = format!("{MODELS}{file}");
        let resolved = config::parse(&text, Some("config/sarai.yaml".as_ref()), env, &overrides).unwrap();
        (resolved.config.memory.budget.bytes(None), resolved.settings["memory.max_ram_gb"].source.clone())
    };
    let (file, name) = ("memory: {max_ram_gb: 3}", "SARAI_MAX_RAM_GB");
    let both = env(&[(name, "5")], &[(name, "4")]);
    let dotenv = env(&[], &[(name, "4")]);
    assert_eq!(budget(file, &both, Some(7.0)), (Bytes::from_gb(7.0), Source::Flag("--max-ram-gb")));
    assert_eq!(budget(file, &both, None), (Bytes::from_gb(5.0), variable(name, Origin::Environment)));
    assert_eq!(budget(file, &dotenv, None), (Bytes::from_gb(4.0), variable(name, Origin::DotEnv)));
    assert_eq!(budget(file, &Env::default(), None), (Bytes::from_gb(3.0), line(6)));
    assert_eq!(budget("memory: {preset: low}", &Env::default(), None), (Bytes::from_gb(2.0), line(6)));
    assert_eq!(budget("", &Env::default(), None), (Bytes::from_gb(6.0), Source::Default));
}

#[test]
fn the_named_variables_win_over_the_file() {
    let text = "
hosts: {lan: {url: 'http://lan:1', total_timeout: 1m, retries: 4}}
models:
  solar: {backend: ollama_http, host: lan, host_model: big, fallback: [lfm2, gguf_native]}
  lfm2: {backend: ollama_http, fallback: gguf_native}
memory: {max_concurrent_llms: 9}
";
    let variables = [
        ("MAX_CONCURRENT_LLMS", "2"),
        ("OLLAMA_BASE_URL", "http://box:9/"),
        ("SOLAR_MODEL_NAME", "solar-pro"),
        ("OLLAMA_TIMEOUT", "30"),
        ("OLLAMA_RETRIES", "0"),
        ("SOLAR_PREFER_HTTP", "false"),
    ];
    let resolved = accepted_in(text, &env(&variables, &[]));
    let config = &resolved.config;
    assert_eq!(config.memory.max_concurrent_llms, 2);
    let (lan, implicit) = (&config.hosts[&"lan".parse().unwrap()], &config.hosts[&"ollama".parse().unwrap()]);
    assert_eq!((lan.url.as_str(), implicit.url.as_str()), ("http://lan:1", "http://box:9"));
    for host in [lan, implicit] {
        let limit = Duration::from_secs(30);
        assert_eq!((host.total_timeout, host.first_token_timeout, host.retries), (limit, limit, 0));
    }
    let solar = &model(&resolved, "solar").places;
    assert!(matches!(&solar[0], Place::Gguf(_)), "the file comes first: {solar:?}");
    assert!(matches!(&solar[1], Place::Hosts { hosts, .. } if hosts[0].model == "solar-pro"), "{solar:?}");
    assert!(matches!(&solar[2], Place::Model(_)), "{solar:?}");
    let lfm2 = &model(&resolved, "lfm2").places;
    assert!(
        matches!(&lfm2[0], Place::Hosts { hosts, .. } if hosts[0].model == "lfm2"),
        "only solar is meant: {lfm2:?}"
    );
    let source = &resolved.settings["models.solar.places"].source;
    assert_eq!(*source, variable("SOLAR_PREFER_HTTP", Origin::Environment));
}

#[test]
fn solar_prefers_its_host_when_told_so() {
    let text = "models: {solar: {backend: gguf_native, fallback: ollama_http}}";
    let first = |value: &str| {
        let resolved = accepted_in(text, &env(&[], &[("SOLAR_PREFER_HTTP", value)]));
        model(&resolved, "solar").places[0].clone()
    };
    assert!(matches!(first("1"), Place::Hosts { .. }));
    assert!(matches!(first(""), Place::Gguf(_)), "set to nothing, it changes nothing");
}

#[test]
fn a_variable_that_makes_no_sense_is_a_problem_of_its_own() {
    let variables = [
        ("MAX_CONCURRENT_LLMS", "0"),
        ("SARAI_MAX_RAM_GB", "much"),
        ("OLLAMA_TIMEOUT", "soon"),
        ("OLLAMA_RETRIES", "-1"),
        ("SOLAR_PREFER_HTTP", "perhaps"),
        ("OLLAMA_BASE_URL", "http://me:hunter2@box"),
    ];
    let found = problems_in(MODELS, &env(&variables[..3], &variables[3..]));
    let mut paths: Vec<_> = found.iter().map(|p| p.path.as_str()).collect();
    paths.sort_unstable();
    let mut names = variables.map(|(name, _)| name);
    names.sort_unstable();
    assert_eq!(paths, names);
    assert!(found.iter().all(|p| p.line.is_none() && p.file.is_none() && !p.message.contains("hunter2")));
    let retries = found.iter().find(|p| p.path == "OLLAMA_RETRIES").unwrap();
    assert_eq!(retries.message, "\"-1\" is not a whole number from 0 to 10 (set in .env)");
}

#[test]
fn flags_are_checked_too() {
    let overrides = Overrides { max_ram_gb: Some(-1.0), max_concurrent_llms: Some(0) };
    let error = config::parse(MODELS, None, &Env::default(), &overrides).unwrap_err();
    let paths: Vec<_> = error.problems.iter().map(|p| p.path.as_str()).collect();
    assert_eq!(paths, ["--max-ram-gb", "--max-concurrent-llms"]);
}

#[test]
fn a_broken_setting_in_the_file_is_reported_even_if_a_variable_covers_it() {
    let text = format!("{MODELS}memory: {{max_concurrent_llms: many}}");
    let error = parse_in(&text, &env(&[("MAX_CONCURRENT_LLMS", "2")], &[])).unwrap_err();
    assert_eq!(error.problems[0].path, "memory.max_concurrent_llms");
}

#[test]
fn every_setting_is_shown_with_where_it_comes_from() {
    let text = "
models:
  solar: {backend: ollama_http, ttl: 90s}
memory:
  max_ram_gb: ${GB}
metrics: {listen: '127.0.0.1:9464'}
";
    let resolved = accepted_in(text, &env(&[("SOLAR_MODEL_NAME", "big")], &[("GB", "12")]));
    let expected = "\
hosts.ollama.connect_timeout: 1s  # default
hosts.ollama.first_token_timeout: 2m  # default
hosts.ollama.keep_alive: 5m  # default
hosts.ollama.kind: ollama  # default
hosts.ollama.load_timeout: 3m  # default
hosts.ollama.parallel: 1  # default
hosts.ollama.retries: 1  # default
hosts.ollama.stall_timeout: 30s  # default
hosts.ollama.total_timeout: 10m  # default
hosts.ollama.url: http://127.0.0.1:11434  # default
hosts.ollama.watch: true  # default
hosts.ollama.watch_interval: 30s  # default
memory.eviction: cost_aware  # default
memory.max_concurrent_llms: 3  # default
memory.max_ram_gb: 12  # file config/sarai.yaml:5, .env GB
memory.monitor_interval: 30s  # default
memory.restore: false  # default
memory.shared: false  # default
memory.strategy: hybrid_http_gguf  # default
metrics.listen: \"127.0.0.1:9464\"  # file config/sarai.yaml:6
models.solar.backend: ollama_http  # file config/sarai.yaml:3
models.solar.class: on_demand  # default
models.solar.context: {max: 8000, min: 1000}  # default
models.solar.host: ollama  # default
models.solar.host_model: big  # environment SOLAR_MODEL_NAME
models.solar.on_stream_failure: error  # default
models.solar.places: [ollama_http:ollama]  # file config/sarai.yaml:3
models.solar.role: llm  # default
models.solar.ttl: 90s  # file config/sarai.yaml:3
queue.max_waiting: 256  # default
queue.wait_timeout: 5m  # default
sessions.max_gb: 2  # default
";
    assert_eq!(resolved.render_resolved(), expected);
}

#[test]
fn variables_are_named_but_their_values_are_not_printed_for_debugging() {
    let shown = format!("{:?}", env(&[("API_TOKEN", "hunter2")], &[("X", "hunter3")]));
    assert!(shown.contains("API_TOKEN") && !shown.contains("hunter"), "{shown}");
}

#[test]
fn a_limit_on_tokens_is_no_secret() {
    let text = format!(
        "{MODELS}pipelines: {{p: {{steps: [{{id: a, model: lfm2, prompt: x, sampling: {{max_tokens: 7}}}}]}}}}"
    );
    assert!(accepted(&text).render_resolved().contains("sampling.max_tokens: 7  # "));
}

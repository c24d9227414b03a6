use std::path::Path;

use proptest::prelude::*;
use sarai_core::config::{self, Env, Overrides};

use super::{MODELS, problem, problems};

#[test]
fn all_problems_come_in_one_go_each_with_its_line() {
    let found = problems(
        "
modles: {}
hosts:
  lan: {kind: vllm, url: 'http://lan:1'}
  attic: {url: 'http://me:hunter2@attic'}
models:
  solar:
    backend: ollama_http
    host: lam
    context: {min: 9000, max: 10}
    fallback:
      - gguf_nativ
      - embedding
  lfm2:
    backend: gguf_native
    threads: many
    labels: {a: [b]}
  embedding: {role: embedding}
memory:
  max_ram_gb: 12
  preset: high
  max_concurrent_llms: 0
queue: full
metrics: {listen: localhost}
pipelines:
  talk:
    input: video
    steps:
      - {id: one, model: lfm3, prompt: hi}
      - {id: one, model: lfm2, prompt: hi, modulate: ho}
",
    );
    let lines: Vec<_> = found.iter().map(|p| (p.line.unwrap(), p.path.as_str())).collect();
    let expected = [
        (2, "modles"),
        (4, "hosts.lan.kind"),
        (5, "hosts.attic.url"),
        (9, "models.solar.host"),
        (10, "models.solar.context"),
        (12, "models.solar.fallback[0]"),
        (13, "models.solar.fallback[1]"),
        (16, "models.lfm2.threads"),
        (17, "models.lfm2.labels"),
        (18, "models.embedding.backend"),
        (21, "memory.preset"),
        (22, "memory.max_concurrent_llms"),
        (23, "queue"),
        (24, "metrics.listen"),
        (27, "pipelines.talk.input"),
        (29, "pipelines.talk.steps[0].model"),
        (30, "pipelines.talk.steps[1].id"),
        (30, "pipelines.talk.steps[1]"),
    ];
    assert_eq!(lines, expected, "{found:#?}");
    assert!(found.iter().all(|p| p.file.as_deref() == Some(Path::new("config/sarai.yaml"))));
    assert!(found.iter().all(|p| !p.message.contains("hunter2")), "a password is never shown");
}

#[test]
fn a_host_that_cannot_work_is_told_with_what_is_wrong_and_what_to_do() {
    let hosts = |host: &str, model: &str| {
        let text = format!(
            "hosts: {{h: {{url: 'http://h:1'}}, o: {{kind: openai, url: 'http://o:1'}}, x: {{{host}}}}}\nmodels: {{m: {{{model}}}}}"
        );
        problems(&text).into_iter().map(|problem| problem.message).collect::<Vec<_>>().join("\n")
    };
    let good = "backend: gguf_native";
    for (host, model, said) in [
        ("url: h:1", good, "must begin with http:// or https://"),
        ("kind: vllm, url: 'http://h'", good, "expected"),
        ("url: 'http://h', api_key_env: NO_SUCH_KEY", good, "the variable NO_SUCH_KEY is not set"),
        ("url: 'http://h', max_ram_gb: -1", good, "must be a size in GB above 0"),
        ("url: 'http://h', max_ram_gb: 6, watch: false", good, "cannot have max_ram_gb"),
        ("url: 'http://h', watch_interval: 0s", good, "must be longer than 0"),
        ("url: 'http://h'", "backend: openai_http", "needs a host of kind openai"),
        ("url: 'http://h'", "backend: openai_http, host: h", "host `h` is of kind ollama"),
        ("url: 'http://h'", "backend: ollama_http, host: [h, o]", "host `o` is of kind openai"),
        (
            "url: 'http://h'",
            "backend: ollama_http, host: h, host_model: {hh: a}",
            "none of its hosts, did you mean `h`?",
        ),
        (
            "url: 'http://h'",
            "backend: ollama_http, host: h, host_model: [a]",
            "expected a name, or names by host",
        ),
        ("url: 'http://h'", "backend: ollama_http, host: h, on_stream_failure: retry", "expected"),
    ] {
        let found = hosts(host, model);
        assert!(found.contains(said), "{host} {model}: {found}");
    }
}

#[test]
fn numbers_that_no_machine_can_keep_are_refused() {
    let text = "hosts: {lan: {url: 'http://lan:1', retries: 11, parallel: 100000}}\nqueue: {max_waiting: 4000000000}\n";
    let found: Vec<_> = problems(&format!("{text}{MODELS}"))
        .into_iter()
        .map(|p| format!("{}: {}", p.path, p.message))
        .collect();
    assert_eq!(
        found,
        [
            "hosts.lan.parallel: must be from 1 to 1000",
            "hosts.lan.retries: must be 10 or less",
            "queue.max_waiting: must be from 1 to 1000000"
        ]
    );
}

#[test]
fn one_problem_neither_hides_the_others_of_its_entry_nor_brings_more() {
    let paths = |text: &str| problems(text).into_iter().map(|p| p.path).collect::<Vec<_>>();
    let host = "hosts: {lan: {url: lan, retries: -1, keep_alive: soon, stall_timeout: 0s}}\n";
    assert_eq!(
        paths(&format!("{host}{MODELS}")),
        ["hosts.lan.url", "hosts.lan.stall_timeout", "hosts.lan.retries", "hosts.lan.keep_alive"]
    );
    let step = "pipelines: {p: {steps: [{id: a, model: lfm3, system: 5, sampling: {top_k: x}}]}}";
    assert_eq!(
        paths(&format!("{MODELS}{step}")),
        [
            "pipelines.p.steps[0]",
            "pipelines.p.steps[0].model",
            "pipelines.p.steps[0].system",
            "pipelines.p.steps[0].sampling.top_k"
        ]
    );
    let role = "  e: {role: embeding, backend: gguf_native}\n  r: {role: router, kind: similarity, model: e, labels: {a: [x]}}";
    assert_eq!(paths(&format!("{MODELS}{role}")), ["models.e.role"]);
    let host = "  x: {backend: ollama_http, host: '${NOWHERE}'}";
    assert_eq!(paths(&format!("{MODELS}{host}")), ["models.x.host"]);
}

#[test]
fn a_problem_names_its_file_line_and_key() {
    let error = config::parse(
        "models:\n  a: {backend: ollama_htp}",
        Some(Path::new("c.yaml")),
        &Env::default(),
        &Overrides::default(),
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "c.yaml:2: models.a.backend: unknown variant `ollama_htp`, expected one of `ollama_http`, `openai_http`, `gguf_native`"
    );
}

#[test]
fn an_unknown_key_names_the_nearest_known_one_at_every_depth() {
    let with = |more: &str| problem(&format!("{MODELS}{more}"));
    assert_eq!(with("mmemory: {}"), "mmemory: unknown key `mmemory`, did you mean `memory`?");
    assert_eq!(
        with("  x: {backend: gguf_native, pth: a}"),
        "models.x.pth: unknown key `pth`, did you mean `path`?"
    );
    assert_eq!(
        with("  x: {backend: gguf_native, context: {mim: 5}}"),
        "models.x.context.mim: unknown key `mim`, did you mean `min`?"
    );
    assert_eq!(
        with("pipelines: {p: {steps: [{id: a, model: lfm2, prompt: x, sampling: {temprature: 1}}]}}"),
        "pipelines.p.steps[0].sampling.temprature: unknown key `temprature`, did you mean `temperature`?"
    );
    assert_eq!(with("zzz: 1"), "zzz: unknown key `zzz`");
}

#[test]
fn text_that_is_not_yaml_says_where() {
    let found = problems("models:\n  a: [1, 2\nb: }\n");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].line, Some(3));
    assert!(found[0].message.starts_with("column "), "{found:?}");
    let found = problems("memory: {max_ram_gb: ${GB}}\n");
    assert!(
        found[0].message.ends_with("within {} or [] put ${..} in quotes, or on a line of its own"),
        "{found:?}"
    );
}

#[test]
fn a_key_given_twice_is_a_problem() {
    let found = problems("models:\n  a: {backend: gguf_native}\nmodels:\n  b: {backend: gguf_native}\n");
    assert_eq!((found[0].line, found.len()), (Some(3), 1));
    assert_eq!(found[0].message, "key `models` is given twice in one mapping; keep one");
}

#[test]
fn a_second_document_a_tag_or_a_strange_key_is_a_problem() {
    for (text, line) in [("models: {}\n---\na: 1\n", 3), ("models: !own {}\n", 1), ("a: 1\n[1, 2]: 3\n", 2)] {
        let found = problems(text);
        assert_eq!((found[0].line, found.len()), (Some(line), 1), "{found:?}");
    }
}

#[test]
fn a_configuration_without_models_is_a_problem() {
    for text in ["", "# nothing\n", "models:\n", "models: {}\n"] {
        assert!(problem(text).starts_with("models: "), "{text:?}");
    }
    assert!(problems("just words")[0].message.contains("expected keys with values"));
}

#[test]
fn a_missing_file_is_a_problem_that_names_it() {
    let path = Path::new("no/such/sarai.yaml");
    let error = config::load(path, &Env::default(), &Overrides::default()).unwrap_err();
    assert_eq!(error.problems[0].file.as_deref(), Some(path));
    assert!(error.to_string().starts_with("no/such/sarai.yaml: cannot read the configuration: "), "{error}");
}

#[test]
fn fallbacks_that_lead_back_are_found_once() {
    let found = problems(
        "models:\n  a: {backend: gguf_native, fallback: b}\n  b: {backend: gguf_native, fallback: c}\n  c: {backend: gguf_native, fallback: b}\n",
    );
    let found: Vec<_> = found.iter().map(|p| (p.line.unwrap(), p.message.as_str())).collect();
    assert_eq!(found, [(3, "these fall back to each other: b -> c -> b")]);
    assert!(
        problem("models:\n  a: {backend: gguf_native, fallback: a}").contains("cannot fall back to itself")
    );
}

#[test]
fn a_model_without_a_place_under_the_strategy_is_a_problem() {
    let found = problem("models: {a: {backend: ollama_http}}\nmemory: {strategy: gguf_only}");
    assert!(found.starts_with("models.a.backend: memory.strategy gguf_only leaves it no place"), "{found}");
}

#[test]
fn references_suggest_the_nearest_name() {
    let with = |more: &str| problem(&format!("{MODELS}{more}"));
    let router = |keys: &str| with(&format!("  r: {{role: router, kind: similarity, {keys}}}"));
    assert_eq!(
        router("model: embeding, labels: {a: [x]}"),
        "models.r.model: unknown model `embeding`, did you mean `embedding`?"
    );
    assert_eq!(
        router("model: lfm2, labels: {a: [x]}"),
        "models.r.model: model `lfm2` has role llm; this needs role embedding"
    );
    assert_eq!(
        router("model: embedding, labels: {hard: [x]}, routes: {hadr: solar}"),
        "models.r.routes.hadr: `hadr` is not among the labels, did you mean `hard`?"
    );
    assert_eq!(
        router("model: embedding, labels: {hard: [x]}, routes: {hard: r}"),
        "models.r.routes.hard: `r` is a router of kind similarity, not a model that can be loaded"
    );
    assert_eq!(
        with("  x: {backend: gguf_native, fallback: sola}"),
        "models.x.fallback: `sola` is neither a backend nor a model, did you mean `solar`?"
    );
    assert_eq!(
        with(
            "pipelines: {p: {steps: [{id: ab, model: lfm2, prompt: x}, {id: c, model: lfm2, prompt: x, needs: abb}]}}"
        ),
        "pipelines.p.steps[1].needs: unknown step `abb`, did you mean `ab`?"
    );
}

#[test]
fn there_is_one_router_and_routing_needs_it() {
    let two = "  r: {role: router, kind: similarity, model: embedding, labels: {a: [x]}}\n  s: {role: router, kind: classifier, backend: gguf_native}\n";
    assert_eq!(problem(&format!("{MODELS}{two}")), "models.s: a second router; r is one already");
    let found = problem(&format!("{MODELS}pipelines: {{p: {{steps: [{{id: a, route: x}}]}}}}"));
    assert!(found.starts_with("pipelines.p.steps[0].route: there is no router"), "{found}");
}

#[test]
fn a_step_does_one_thing_with_the_keys_of_that_thing() {
    let step = |keys: &str| problem(&format!("{MODELS}pipelines: {{p: {{steps: [{{{keys}}}]}}}}"));
    assert!(step("id: a, model: lfm2").contains("does nothing"));
    assert!(step("id: a, model: lfm2, prompt: x, route: y").contains("more than one thing (prompt, route)"));
    assert!(step("model: lfm2, prompt: x").contains("steps[0].id: missing"));
    assert!(step("id: a, model: lfm2, modulate: x").contains("tone: missing"));
    assert!(step("id: a, model: lfm2, prompt: x, tone: t").contains("`tone` belongs to modulate"));
    assert!(step("id: input, model: lfm2, prompt: x").contains("is the pipeline's input"));
    assert!(
        step("id: a, model: lfm2, prompt: x, sampling: {top_p: 1.5}").contains("top_p: must be from 0 to 1")
    );
    assert!(step("id: a, model: lfm2, prompt: x, timeout: 0s").contains("timeout: must be longer than 0"));
}

#[test]
fn a_value_of_the_wrong_type_says_what_was_found_and_expected() {
    let with = |more: &str| problem(&format!("{MODELS}{more}"));
    assert_eq!(
        with("memory: {max_ram_gb: lots}"),
        "memory.max_ram_gb: found string \"lots\", expected a number"
    );
    assert_eq!(
        with("queue: {wait_timeout: 30}"),
        "queue.wait_timeout: found 30, expected a duration: a whole number and a unit, such as 500ms, 45s, 5m or 1h"
    );
    assert_eq!(with("queue: [1]"), "queue: found a list, expected keys with values");
    assert_eq!(
        with("hosts: {lan: {kind: [ollama], url: 'http://lan'}}"),
        "hosts.lan.kind: found a list, expected a word"
    );
    for gb in ["-1", "0", ".nan", ".inf"] {
        assert_eq!(
            with(&format!("memory: {{max_ram_gb: {gb}}}")),
            "memory.max_ram_gb: must be a size in GB above 0"
        );
    }
}

#[test]
fn deep_nesting_is_refused_before_it_can_exhaust_the_stack() {
    for text in ["- ".repeat(100_000), "[".repeat(100_000), "? ".repeat(100_000), "{a: ".repeat(10_000)] {
        assert_eq!(problems(&text).len(), 1);
    }
    let brackets = |i: usize| format!("a{i}: &a{i} {}*a{}{}\n", "[".repeat(200), i - 1, "]".repeat(200));
    let aliases: String = (1..30).map(brackets).collect();
    assert!(problems(&format!("a0: &a0 x\n{aliases}"))[0].message.contains("nested too deeply"));
    let staircase: String = (0..2_000).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
    assert!(problems(&staircase)[0].message.contains("nested too deeply"));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        let _ = config::parse(&text, None, &Env::default(), &Overrides::default());
    }

    #[test]
    fn no_text_that_looks_like_a_configuration_makes_it_panic(
        text in r##"((models|memory|hosts|pipelines|steps|a|b): ?|[-\[\]{},?:&*!|>'"#\n ]| {1,4}|\$\{?|A:-|[0-9.]+|null|true|~|é|\t){0,60}"##,
    ) {
        let _ = config::parse(&text, None, &Env::default(), &Overrides::default());
    }

    #[test]
    fn no_value_in_a_known_place_makes_it_panic(key in 0..8_usize, value in r##"[-0-9a-z.:/@\[\]{}$"' ]{0,20}"##) {
        let keys = ["memory: {max_ram_gb", "memory: {max_concurrent_llms", "queue: {wait_timeout", "metrics: {listen",
            "hosts: {a: {url", "hosts: {a: {total_timeout", "pipelines: {a: {steps", "memory: {strategy"];
        let close = "}".repeat(keys[key].matches('{').count());
        let text = format!("{MODELS}{}: {value}{close}", keys[key]);
        let _ = config::parse(&text, None, &Env::default(), &Overrides::default());
    }
}

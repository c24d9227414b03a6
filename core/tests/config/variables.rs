use std::time::Duration;

use sarai_core::config::{Place, StepAction};

use super::{MODELS, accepted, accepted_in, env, model, problems, problems_in};

fn host_model(text: &str, variables: &[(&str, &str)]) -> String {
    let text = format!("models: {{m: {{backend: ollama_http, host_model: {text}}}}}");
    let resolved = accepted_in(&text, &env(variables, &[]));
    match &model(&resolved, "m").places[0] {
        Place::Hosts { hosts, .. } => hosts[0].model.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn variables_expand_and_defaults_stand_in() {
    assert_eq!(host_model("'${A}-${B:-small}'", &[("A", "big")]), "big-small");
    assert_eq!(host_model("'${A:-x:7b}'", &[]), "x:7b");
    assert_eq!(host_model("'${A:-x}'", &[("A", "")]), "x", "set to nothing is not set");
    assert_eq!(host_model("'a$${B}'", &[("B", "no")]), "a${B}");
    assert_eq!(host_model("'$A $'", &[("A", "no")]), "$A $");
}

#[test]
fn an_unquoted_variable_can_be_a_number_and_a_quoted_one_is_text() {
    let plain = format!("{MODELS}memory:\n  max_concurrent_llms: ${{N:-5}}\n");
    assert_eq!(accepted(&plain).config.memory.max_concurrent_llms, 5);
    let quoted = format!("{MODELS}memory:\n  max_concurrent_llms: \"${{N:-5}}\"\n");
    assert_eq!(problems(&quoted)[0].path, "memory.max_concurrent_llms");
    assert_eq!(host_model("'${N}'", &[("N", "7")]), "7");
}

#[test]
fn a_value_cannot_add_keys_or_lists() {
    let sneaky = "x\n  evil: {backend: gguf_native}";
    let text = "models:\n  m:\n    backend: ollama_http\n    host_model: ${A}\n";
    let resolved = accepted_in(text, &env(&[("A", sneaky)], &[]));
    assert_eq!(resolved.config.models.len(), 1);
    let found =
        problems_in(&format!("{MODELS}queue:\n  max_waiting: ${{A}}\n"), &env(&[("A", "{a: 1}")], &[]));
    assert_eq!(found[0].message, "found string \"{a: 1}\", expected a whole number from 0 up");
}

#[test]
fn a_variable_without_value_or_end_is_a_problem_at_its_line() {
    let found = problems("models:\n  a:\n    backend: gguf_native\n    path: ${HOME_OF_MODELS}/a\n");
    assert_eq!((found[0].line, found[0].path.as_str()), (Some(4), "models.a.path"));
    assert!(found[0].message.contains("HOME_OF_MODELS is not set"), "{found:?}");
    for bad in ["${A", "${}", "${A B}", "${A:-${B}}", "${1}"] {
        let found = problems(&format!("models: {{a: {{backend: gguf_native, path: '{bad}'}}}}"));
        assert_eq!((found.len(), found[0].path.as_str()), (1, "models.a.path"), "{bad}: {found:?}");
    }
}

#[test]
fn templates_are_left_alone() {
    let text = format!(
        "{MODELS}pipelines: {{p: {{steps: [{{id: a, model: lfm2, prompt: '{{{{ input.text }}}} $5'}}]}}}}"
    );
    let config = accepted(&text).config;
    let StepAction::Prompt { prompt, .. } = &config.pipelines[&"p".parse().unwrap()].steps[0].action else {
        panic!()
    };
    assert_eq!(prompt, "{{ input.text }} $5");
}

#[test]
fn a_value_from_a_secret_variable_is_never_shown() {
    let text = format!("{MODELS}queue:\n  max_waiting: ${{API_TOKEN}}\n");
    let found = problems_in(&text, &env(&[("API_TOKEN", "hunter2")], &[]));
    assert!(!found[0].message.contains("hunter2"), "{found:?}");
    let text = "models: {m: {backend: ollama_http, host_model: '${API_TOKEN}'}}";
    let shown = accepted_in(text, &env(&[("API_TOKEN", "hunter2")], &[])).render_resolved();
    assert!(shown.contains("models.m.host_model: (hidden)  # "), "{shown}");
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn anchors_are_values_like_others() {
    let text = "models:\n  a: &base {backend: gguf_native, ttl: 5s}\n  b: *base\n";
    assert_eq!(model(&accepted(text), "b").ttl, Some(Duration::from_secs(5)));
}

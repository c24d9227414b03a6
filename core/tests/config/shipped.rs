use std::fs;

use sarai_core::config::{self, Env, Overrides};

use super::{env, repository};

#[test]
fn the_shipped_configuration_has_no_problems_and_no_warnings() {
    let path = repository("config/sarai.yaml");
    let resolved =
        config::load(&path, &Env::default(), &Overrides::default()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(resolved.warnings, []);
    assert_eq!(resolved.config.models.len(), 4);
    assert!(resolved.config.router.is_some());
    assert_eq!(resolved.config.pipelines.len(), 5);
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().next(), Some("# yaml-language-server: $schema=sarai.schema.json"));
}

/// Unknown keys are found by the schema, so this holds for every example in one go: a misspelt one is refused.
#[test]
fn the_commented_lines_of_the_shipped_configuration_hold_too() {
    let path = repository("config/sarai.yaml");
    let parse = |text: &str| config::parse(text, Some(&path), &Env::default(), &Overrides::default());
    let text = fs::read_to_string(&path).unwrap();
    let metrics = text.replace("# metrics: ", "metrics: ");
    assert_ne!(text, metrics);
    let resolved = parse(&metrics).unwrap();
    assert!(resolved.config.metrics.is_some());
    let misspelt = text.replace("max_concurrent_llms", "max_concurent_llms");
    assert!(parse(&misspelt).is_err());
}

#[test]
fn the_shipped_schema_is_the_one_the_types_give() {
    let on_disk = fs::read_to_string(repository("config/sarai.schema.json")).unwrap();
    let generated = serde_json::to_string_pretty(&config::json_schema()).unwrap();
    assert!(
        on_disk.trim_end() == generated,
        "out of date; run: cargo run --release -p sarai-core --example schema > config/sarai.schema.json"
    );
}

#[test]
fn every_key_of_the_schema_has_a_description() {
    fn undescribed(schema: &serde_json::Value, path: &str, out: &mut Vec<String>) {
        for (key, below) in schema.get("properties").and_then(|p| p.as_object()).into_iter().flatten() {
            let path = format!("{path}.{key}");
            if below.get("description").is_none() {
                out.push(path.clone());
            }
            undescribed(below, &path, out);
        }
        for key in ["items", "additionalProperties"] {
            schema.get(key).into_iter().for_each(|below| undescribed(below, path, out));
        }
    }
    let (schema, mut out) = (config::json_schema(), Vec::new());
    undescribed(&schema, "", &mut out);
    assert_eq!(out, Vec::<String>::new());
    assert!(schema.to_string().len() > 10_000, "the walk had something to look at");
}

#[test]
fn the_shipped_variables_are_those_that_are_read() {
    let text = fs::read_to_string(repository(".env.example")).unwrap();
    let names: Vec<&str> = text.lines().filter_map(|line| line.strip_suffix('=')).collect();
    assert_eq!(names.len(), text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count());
    for name in names {
        // A value that fits no setting is refused by each that reads it, except by a name that may be anything.
        let refused = config::parse(super::MODELS, None, &env(&[(name, "@")], &[]), &Overrides::default());
        assert_eq!(refused.is_err(), name != "SOLAR_MODEL_NAME", "{name}");
    }
}

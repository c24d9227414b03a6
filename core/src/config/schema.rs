//! The JSON schema of the file, for editors, and the search for keys that it does not have.

use std::collections::BTreeSet;

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::at::At;
use super::check::{Check, did_you_mean};
use super::raw::RawConfig;
use super::tree::{Data, Node};

/// The JSON schema (draft 7) of the configuration file, as generated from the types that read it. It allows
/// `${VAR}` where numbers stand.
#[must_use]
pub fn json_schema() -> Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<RawConfig>();
    schema.insert("title".to_owned(), "sarai configuration".into());
    schema.to_value()
}

/// Notes a problem for every key that the schema does not have, with the nearest that it does.
pub(super) fn unknown_keys(root: &Node, check: &mut Check<'_>) {
    walk(&[&json_schema()], &At::root(root), check);
}

/// `shapes` are the schemas of which any may describe the value.
fn walk(shapes: &[&Value], at: &At<'_>, check: &mut Check<'_>) {
    let shapes: Vec<&Value> = shapes.iter().flat_map(|shape| alternatives(shape)).collect();
    match at.node.map(|node| &node.data) {
        Some(Data::Map(entries)) => {
            let known: BTreeSet<&str> = shapes.iter().flat_map(|shape| keys(shape)).collect();
            // A value of another type altogether is reported where it is read.
            let any_keys =
                shapes.iter().any(|shape| shape.get("additionalProperties").is_some_and(Value::is_object));
            for entry in entries {
                let below: Vec<&Value> = shapes.iter().filter_map(|shape| child(shape, &entry.key)).collect();
                if !below.is_empty() {
                    walk(&below, &at.key(&entry.key), check);
                } else if !known.is_empty() && !any_keys {
                    let hint = did_you_mean(&entry.key, known.iter().copied());
                    check.problem(&at.key(&entry.key), format!("unknown key `{}`{hint}", entry.key));
                }
            }
        }
        Some(Data::List(items)) => {
            let below: Vec<&Value> = shapes.iter().filter_map(|shape| shape.get("items")).collect();
            for index in 0..items.len() {
                walk(&below, &at.item(index), check);
            }
        }
        Some(Data::Null | Data::Bool(_) | Data::Int(_) | Data::Float(_) | Data::Text { .. }) | None => {}
    }
}

/// A schema and all those it is any of.
fn alternatives(shape: &Value) -> Vec<&Value> {
    let mut all = vec![shape];
    for word in ["anyOf", "oneOf", "allOf"] {
        let branches = shape.get(word).and_then(Value::as_array).into_iter().flatten();
        all.extend(branches.flat_map(alternatives));
    }
    all
}

fn keys(shape: &Value) -> impl Iterator<Item = &str> {
    shape.get("properties").and_then(Value::as_object).into_iter().flatten().map(|(key, _)| key.as_str())
}

/// The schema of the value of `key`.
fn child<'s>(shape: &'s Value, key: &str) -> Option<&'s Value> {
    let named = shape.get("properties").and_then(|properties| properties.get(key));
    named.or_else(|| shape.get("additionalProperties").filter(|schema| schema.is_object()))
}

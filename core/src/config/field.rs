//! A field that outlives a value of the wrong type, so that one slip does not hide the next.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_yaml::Value;

/// A field of a raw shape: left out, given, or given with a value of the wrong type.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Field<T> {
    /// Not in the file, or in it without a value.
    #[default]
    Absent,
    /// There, and of the right type.
    Given(T),
    /// There, and of the wrong type; what serde says, in plain words.
    Wrong(String),
}

impl<T> Field<T> {
    /// The value, where it is given and right.
    pub(super) const fn given(&self) -> Option<&T> {
        match self {
            Self::Given(value) => Some(value),
            Self::Absent | Self::Wrong(_) => None,
        }
    }

    /// Whether the file does not have it.
    pub(super) const fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

impl<T: DeserializeOwned> Field<T> {
    /// Reads a value that was parsed before.
    pub(super) fn of(value: Value) -> Self {
        if value.is_null() {
            return Self::Absent;
        }
        match serde_yaml::from_value(value) {
            Ok(value) => Self::Given(value),
            Err(error) => Self::Wrong(in_plain_words(&error.to_string())),
        }
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::of)
    }
}

/// The schema of the value. A number or a switch may also stand in a variable.
impl<T: JsonSchema> JsonSchema for Field<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    // Not that of `T`: within its own schema, a type is a reference instead of being inlined.
    fn schema_id() -> Cow<'static, str> {
        format!("Field<{}>", T::schema_id()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let schema = generator.subschema_for::<T>();
        match schema.get("type").and_then(serde_json::Value::as_str) {
            Some("integer" | "number" | "boolean") => json_schema!({
                "anyOf": [schema, { "type": "string", "pattern": VARIABLE_PATTERN }],
            }),
            _ => schema,
        }
    }
}

/// Text with a variable in it, as a JSON schema's regular expression.
pub(super) const VARIABLE_PATTERN: &str = r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}";

/// serde's message without the names of Rust's types.
fn in_plain_words(message: &str) -> String {
    let typed = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    let Some((found, expected)) = typed.and_then(|rest| rest.rsplit_once(", expected ")) else {
        return message.to_owned();
    };
    let expected = match expected {
        "f64" | "f32" => "a number",
        "u32" | "u64" | "usize" => "a whole number from 0 up",
        "a boolean" => "true or false",
        "a string" => "text; put it in quotes",
        "a sequence" => "a list",
        "a map" => "keys with values",
        shape if shape.starts_with("struct ") => "keys with values",
        "a Value::Tagged enum" => "a word",
        other => other,
    };
    let found = match found {
        "map" => "keys with values",
        "sequence" => "a list",
        other => other,
    };
    format!("found {found}, expected {expected}")
}

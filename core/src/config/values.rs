//! Values that the file writes in more than one way.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_yaml::Value;

use super::field::{Field, VARIABLE_PATTERN};

/// A duration as people write it: a whole number and its unit, `500ms`, `45s`, `5m` or `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span(pub(super) Duration);

impl Span {
    pub(super) const EXPECTED: &'static str =
        "a duration: a whole number and a unit, such as 500ms, 45s, 5m or 1h";

    pub(super) const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let unit_start = text.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = text.split_at(unit_start);
        let millis_per_unit: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        let millis = number.parse::<u64>().ok()?.checked_mul(millis_per_unit)?;
        Some(Self(Duration::from_millis(millis)))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let wrong = || D::Error::custom(format!("found {}, expected {}", shown(&value), Self::EXPECTED));
        value.as_str().and_then(Self::parse).ok_or_else(wrong)
    }
}

/// In the largest unit that shows it exactly.
impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let millis = self.0.as_millis();
        let text = [(3_600_000, "h"), (60_000, "m"), (1_000, "s")]
            .into_iter()
            .find(|(unit, _)| millis > 0 && millis.is_multiple_of(*unit))
            .map_or_else(|| format!("{millis}ms"), |(unit, name)| format!("{}{name}", millis / unit));
        serializer.serialize_str(&text)
    }
}

impl JsonSchema for Span {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let pattern = format!("^[0-9]+(ms|s|m|h)$|{VARIABLE_PATTERN}");
        json_schema!({ "type": "string", "pattern": pattern, "examples": ["500ms", "45s", "5m", "1h"] })
    }
}

/// A name, or a list of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Names {
    One(String),
    Several(Vec<String>),
}

impl Names {
    pub(super) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        }
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if let Some(name) = value.as_str() {
            return Ok(Self::One(name.to_owned()));
        }
        let wrong =
            |found: String| D::Error::custom(format!("found {found}, expected a name or a list of names"));
        let Some(items) = value.as_sequence() else { return Err(wrong(shown(&value))) };
        let name = |item: &Value| {
            item.as_str().map(str::to_owned).ok_or_else(|| wrong(format!("{} in the list", shown(item))))
        };
        items.iter().map(name).collect::<Result<_, _>>().map(Self::Several)
    }
}

/// A model's name on hosts: the same on all, or by host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum HostModels {
    Same(String),
    ByHost(BTreeMap<String, String>),
}

impl<'de> Deserialize<'de> for HostModels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if let Some(name) = value.as_str() {
            return Ok(Self::Same(name.to_owned()));
        }
        let wrong =
            |found: String| D::Error::custom(format!("found {found}, expected a name, or names by host"));
        let Some(names) = value.as_mapping() else { return Err(wrong(shown(&value))) };
        let entry = |(host, name): (&Value, &Value)| match (host.as_str(), name.as_str()) {
            (Some(host), Some(name)) => Ok((host.to_owned(), name.to_owned())),
            _ => Err(wrong(format!("{} among the names", shown(name)))),
        };
        names.iter().map(entry).collect::<Result<_, _>>().map(Self::ByHost)
    }
}

/// A context length: `auto`, a number of tokens, or bounds for `auto`.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RawContext {
    Auto,
    Tokens(u32),
    Bounds(RawBounds),
}

/// Bounds of a context length that is chosen at load.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(deny_unknown_fields)]
pub(super) struct RawBounds {
    /// At least this many tokens. Default: 1000.
    #[schemars(range(min = 1))]
    pub(super) min: Field<u32>,
    /// At most this many tokens. Default: 8000.
    #[schemars(range(min = 1))]
    pub(super) max: Field<u32>,
}

impl<'de> Deserialize<'de> for RawContext {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if value.as_str() == Some("auto") {
            return Ok(Self::Auto);
        }
        if let Some(tokens) = value.as_u64().and_then(|tokens| u32::try_from(tokens).ok()) {
            return Ok(Self::Tokens(tokens));
        }
        if value.is_mapping() {
            return RawBounds::deserialize(value).map(Self::Bounds).map_err(D::Error::custom);
        }
        let found = shown(&value);
        Err(D::Error::custom(format!(
            "found {found}, expected auto, a number of tokens, or {{min: N, max: N}}"
        )))
    }
}

impl JsonSchema for RawContext {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Context".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "const": "auto" },
            { "type": "integer", "minimum": 1 },
            generator.subschema_for::<RawBounds>(),
            { "type": "string", "pattern": VARIABLE_PATTERN },
        ]})
    }
}

/// A value in a message: scalars as they are, the rest by kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => format!("{value:?}"),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "keys with values".to_owned(),
        Value::Tagged(_) => "a tagged value".to_owned(),
    }
}

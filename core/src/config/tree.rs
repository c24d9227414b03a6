//! The YAML text as a tree whose every value knows its line.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, ScanError, YamlData};
use serde_yaml::Value;

use super::sources::Variable;

/// Columns of indentation and list marks before a line's first word. The YAML parser recurses once per level, and
/// each level of block nesting takes at least one such column; it counts the levels of brackets itself, up to 255.
const MAX_INDENT: usize = 128;

/// Levels of nesting; a configuration has about ten.
const MAX_DEPTH: usize = 64;

/// Stack for the YAML parser. Aliases within aliases nest deeper than the text does: as the parser copies 100,000
/// nodes at most, and a chain of aliases 255 levels apart copies d² / 510 of them to reach depth d, that is about
/// 7,000 levels at most.
const STACK_BYTES: usize = 32 << 20;

/// A value of the file.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// The line it starts on, from 1.
    pub(super) line: usize,
    /// What it is.
    pub(super) data: Data,
    /// The variables that were expanded in it.
    pub(super) variables: Vec<Variable>,
    /// The file that it and all below it stand in, where that is not the configuration itself.
    pub(super) file: Option<Arc<Path>>,
}

/// The kinds of value.
#[derive(Clone, Debug)]
pub(super) enum Data {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    /// Text, and whether it stands in the file without quotes.
    Text {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    /// The line of the key, from 1.
    pub(super) line: usize,
    pub(super) value: Node,
}

/// Something that is not YAML, or YAML that a configuration cannot use.
#[derive(Debug)]
pub(super) struct Misfit {
    pub(super) line: usize,
    pub(super) message: String,
}

/// Parses `text`, one YAML document. An empty text is an empty mapping.
pub(super) fn read(text: &str) -> Result<Node, Vec<Misfit>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some(line) = text.lines().position(|line| indent(line) > MAX_INDENT) {
        let message = format!("nested too deeply: more than {MAX_INDENT} columns of indentation");
        return Err(vec![Misfit { line: line + 1, message }]);
    }
    std::thread::scope(|scope| {
        let parser = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || parse(text));
        match parser.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(tree)) => tree,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(error) => {
                Err(vec![Misfit { line: 1, message: format!("cannot start a thread to parse it: {error}") }])
            }
        }
    })
}

/// Recurses as deeply as `text` nests with its aliases put in; the result nests no deeper than [`MAX_DEPTH`].
fn parse(text: &str) -> Result<Node, Vec<Misfit>> {
    let documents = MarkedYaml::load_from_str(text).map_err(|error| vec![syntax(text, &error)])?;
    if let Some(second) = documents.get(1) {
        let message = "a second YAML document starts here; keep one".to_owned();
        return Err(vec![Misfit { line: second.span.start.line(), message }]);
    }
    let mut misfits = Vec::new();
    let root = match documents.first() {
        Some(root) if !root.is_badvalue() => convert(root, 0, text, &mut misfits),
        Some(_) | None => Node { line: 1, data: Data::Map(Vec::new()), variables: Vec::new(), file: None },
    };
    if misfits.is_empty() { Ok(root) } else { Err(misfits) }
}

impl Node {
    /// The entry of a mapping; `None` too where this is no mapping.
    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        match &self.data {
            Data::Map(entries) => entries.iter().find(|entry| entry.key == key),
            Data::Null
            | Data::Bool(_)
            | Data::Int(_)
            | Data::Float(_)
            | Data::Text { .. }
            | Data::List(_) => None,
        }
    }

    /// The item of a list; `None` too where this is no list.
    pub(super) fn item(&self, index: usize) -> Option<&Self> {
        match &self.data {
            Data::List(items) => items.get(index),
            Data::Null | Data::Bool(_) | Data::Int(_) | Data::Float(_) | Data::Text { .. } | Data::Map(_) => {
                None
            }
        }
    }

    /// Whether this is a mapping without entries.
    pub(super) fn is_empty_map(&self) -> bool {
        matches!(&self.data, Data::Map(entries) if entries.is_empty())
    }

    /// The same value without its lines, for serde.
    pub(super) fn to_value(&self) -> Value {
        match &self.data {
            Data::Null => Value::Null,
            Data::Bool(value) => Value::from(*value),
            Data::Int(value) => Value::from(*value),
            Data::Float(value) => Value::from(*value),
            Data::Text { text, .. } => Value::from(text.as_str()),
            Data::List(items) => Value::Sequence(items.iter().map(Self::to_value).collect()),
            Data::Map(entries) => {
                let pairs = entries.iter().map(|e| (Value::from(e.key.as_str()), e.value.to_value()));
                Value::Mapping(pairs.collect())
            }
        }
    }
}

impl Data {
    /// What an unquoted scalar means, by YAML's core schema.
    pub(super) fn plain(text: &str) -> Self {
        if text.is_empty() {
            return Self::Null;
        }
        Self::scalar(&Scalar::parse_from_cow(Cow::Borrowed(text)), true)
    }

    fn scalar(scalar: &Scalar<'_>, plain: bool) -> Self {
        match scalar {
            Scalar::Null => Self::Null,
            Scalar::Boolean(value) => Self::Bool(*value),
            Scalar::Integer(value) => Self::Int(*value),
            Scalar::FloatingPoint(value) => Self::Float(value.0),
            Scalar::String(text) => Self::Text { text: text.clone().into_owned(), plain },
        }
    }
}

fn convert(yaml: &MarkedYaml<'_>, depth: usize, text: &str, misfits: &mut Vec<Misfit>) -> Node {
    let line = yaml.span.start.line();
    let mut misfit = |message: &str| {
        misfits.push(Misfit { line, message: message.to_owned() });
        Data::Null
    };
    let data = match &yaml.data {
        YamlData::Sequence(_) | YamlData::Mapping(_) if depth == MAX_DEPTH => misfit("nested too deeply"),
        YamlData::Value(scalar) => Data::scalar(scalar, is_plain(text, yaml.span.start.index())),
        YamlData::Sequence(items) => {
            Data::List(items.iter().map(|item| convert(item, depth + 1, text, misfits)).collect())
        }
        YamlData::Mapping(map) => {
            let entries = map.iter().filter_map(|(key, value)| entry(key, value, depth, text, misfits));
            Data::Map(entries.collect())
        }
        YamlData::Tagged(..) => misfit("tags such as !name are not used here; remove it"),
        YamlData::Representation(..) | YamlData::Alias(_) | YamlData::BadValue => {
            misfit("this value does not fit its tag, or refers to an anchor that does not exist")
        }
    };
    Node { line, data, variables: Vec::new(), file: None }
}

fn entry(
    key: &MarkedYaml<'_>,
    value: &MarkedYaml<'_>,
    depth: usize,
    text: &str,
    misfits: &mut Vec<Misfit>,
) -> Option<Entry> {
    let line = key.span.start.line();
    let name = match &key.data {
        YamlData::Value(Scalar::String(name)) => name.clone().into_owned(),
        YamlData::Value(Scalar::Integer(name)) => name.to_string(),
        YamlData::Value(Scalar::FloatingPoint(name)) => name.to_string(),
        YamlData::Value(Scalar::Boolean(name)) => name.to_string(),
        YamlData::Value(Scalar::Null)
        | YamlData::Sequence(_)
        | YamlData::Mapping(_)
        | YamlData::Tagged(..)
        | YamlData::Representation(..)
        | YamlData::Alias(_)
        | YamlData::BadValue => {
            misfits.push(Misfit { line, message: "a key must be a word".to_owned() });
            return None;
        }
    };
    Some(Entry { key: name, line, value: convert(value, depth + 1, text, misfits) })
}

/// Whether the scalar at `index` (in characters) is neither quoted, nor a block, nor an alias.
fn is_plain(text: &str, index: usize) -> bool {
    !matches!(text.chars().nth(index), Some('"' | '\'' | '|' | '>' | '*'))
}

fn indent(line: &str) -> usize {
    line.chars().take_while(|c| matches!(c, ' ' | '\t' | '-' | '?' | ':')).count()
}

fn syntax(text: &str, error: &ScanError) -> Misfit {
    let place = error.marker();
    let message = if error.info() == "duplicated key in mapping" {
        let rest = text.chars().skip(place.index());
        let key: String = rest.take_while(|c| !matches!(c, ':' | '\n')).collect();
        format!("key `{}` is given twice in one mapping; keep one", key.trim())
    } else {
        let in_flow =
            text.lines().nth(place.line().saturating_sub(1)).is_some_and(|line| line.contains("${"));
        let hint =
            if in_flow { "; within {} or [] put ${..} in quotes, or on a line of its own" } else { "" };
        format!("column {}: not YAML: {}{hint}", place.col() + 1, error.info())
    };
    Misfit { line: place.line(), message }
}

//! `${VAR}` in the file's values. It happens after parsing, so that a value cannot add keys or lists of its own.

use super::at::At;
use super::check::Check;
use super::sources::{Env, Variable};
use super::tree::{Data, Node};

/// Expands `${VAR}` and `${VAR:-default}` in every scalar below `node`. An unquoted scalar is then read again, so
/// that a variable can hold a number; a quoted one stays text.
pub(super) fn expand(node: &mut Node, path: &str, check: &mut Check<'_>) {
    match &mut node.data {
        Data::Null | Data::Bool(_) | Data::Int(_) | Data::Float(_) => {}
        Data::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                expand(item, &At::item_path(path, index), check);
            }
        }
        Data::Map(entries) => {
            for entry in entries {
                expand(&mut entry.value, &At::key_path(path, &entry.key), check);
            }
        }
        Data::Text { text, plain } => {
            if !text.contains("${") {
                return;
            }
            match scalar(text, check.env) {
                Ok((value, variables)) => {
                    node.variables = variables;
                    node.data =
                        if *plain { Data::plain(&value) } else { Data::Text { text: value, plain: false } };
                }
                Err(message) => check.unexpanded(path, node.line, message),
            }
        }
    }
}

/// The text with its variables put in, and the variables that were set.
fn scalar(text: &str, env: &Env) -> Result<(String, Vec<Variable>), String> {
    let mut out = String::with_capacity(text.len());
    let mut used = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let (before, reference) = (&rest[..start], &rest[start + 2..]);
        if let Some(before) = before.strip_suffix('$') {
            out.push_str(before);
            out.push_str("${");
            rest = reference;
            continue;
        }
        out.push_str(before);
        let Some((inside, after)) = reference.split_once('}') else {
            return Err("`${` without its `}`; write `$${` for the two characters themselves".to_owned());
        };
        let (value, variable) = lookup(inside, env)?;
        out.push_str(value);
        used.extend(variable);
        rest = after;
    }
    out.push_str(rest);
    Ok((out, used))
}

/// The value of what stands between `${` and `}`.
fn lookup<'a>(inside: &'a str, env: &'a Env) -> Result<(&'a str, Option<Variable>), String> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    if !is_variable_name(name) {
        return Err(format!(
            "`${{{inside}}}` is not a variable: write ${{NAME}} or ${{NAME:-default}}, or `$${{` for the two characters themselves"
        ));
    }
    if default.is_some_and(|default| default.contains("${")) {
        return Err(format!("the default of ${{{name}}} cannot hold another variable"));
    }
    match (env.get(name), default) {
        (Some((value, variable)), _) => Ok((value, Some(variable))),
        (None, Some(default)) => Ok((default, None)),
        (None, None) => {
            Err(format!("variable {name} is not set; set it, or give a default: ${{{name}:-default}}"))
        }
    }
}

fn is_variable_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

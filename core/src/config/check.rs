//! Reads single settings out of the raw shapes, and collects the problems and the sources as it goes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::at::At;
use super::field::Field;
use super::resolved::{Setting, is_secret_key, is_secret_variable};
use super::sources::{Env, Source};
use super::{ConfigError, Problem};
use crate::nearest::nearest;

/// A configuration in the course of being checked.
#[derive(Debug)]
pub(super) struct Check<'a> {
    pub(super) file: Option<&'a Path>,
    /// Another file that is being read.
    within: Option<PathBuf>,
    pub(super) env: &'a Env,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    settings: BTreeMap<String, Setting>,
    /// Paths of values whose variables could not be expanded. What else is wrong with them follows from that.
    unexpanded: BTreeSet<String>,
}

/// What a finished check leaves besides the configuration.
#[derive(Debug)]
pub(super) struct Findings {
    pub(super) warnings: Vec<Problem>,
    pub(super) settings: BTreeMap<String, Setting>,
}

impl<'a> Check<'a> {
    pub(super) const fn new(file: Option<&'a Path>, env: &'a Env) -> Self {
        Self {
            file,
            within: None,
            env,
            problems: Vec::new(),
            warnings: Vec::new(),
            settings: BTreeMap::new(),
            unexpanded: BTreeSet::new(),
        }
    }

    /// The warnings and settings, or all problems if there are any, both in the file's order.
    pub(super) fn finish(mut self) -> Result<Findings, ConfigError> {
        self.problems.sort_by_key(|problem| problem.line);
        self.warnings.sort_by_key(|warning| warning.line);
        if self.problems.is_empty() {
            Ok(Findings { warnings: self.warnings, settings: self.settings })
        } else {
            Err(ConfigError { problems: self.problems })
        }
    }

    /// The value of a field that may be left out.
    pub(super) fn read<T>(&mut self, at: &At<'_>, field: Field<T>) -> Option<T> {
        match field {
            Field::Absent => None,
            Field::Given(value) => Some(value),
            Field::Wrong(message) => {
                let secret =
                    at.node.is_some_and(|node| node.variables.iter().any(|v| is_secret_variable(&v.name)));
                let message = if secret || is_secret_key(&at.path) {
                    "the value is of the wrong type; it is not shown here".to_owned()
                } else {
                    message
                };
                self.problem(at, message);
                None
            }
        }
    }

    /// The value of a field that may be left out, noted as a setting where it is given.
    pub(super) fn optional<T: Serialize>(&mut self, at: &At<'_>, field: Field<T>) -> Option<T> {
        let value = self.read(at, field)?;
        self.note(at, &value, self.source(at));
        Some(value)
    }

    /// The value of a field, or its default, noted as a setting.
    pub(super) fn setting<T: Serialize>(&mut self, at: &At<'_>, field: Field<T>, default: T) -> T {
        self.layered(at, field, None, default)
    }

    /// As [`Check::setting`], but a value from `above` the file wins. The file's own is checked all the same.
    pub(super) fn layered<T: Serialize>(
        &mut self,
        at: &At<'_>,
        field: Field<T>,
        above: Option<(T, Source)>,
        default: T,
    ) -> T {
        let in_file = self.read(at, field);
        let (value, source) = match (above, in_file) {
            (Some((value, source)), _) => (value, source),
            (None, Some(value)) => (value, self.source(at)),
            (None, None) => (default, Source::Default),
        };
        self.note(at, &value, source);
        value
    }

    /// A named variable's value, as `parse` understands it.
    pub(super) fn variable<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Option<T>,
        expected: &str,
    ) -> Option<(T, Source)> {
        let (text, variable) = self.env.get(name)?;
        if let Some(value) = parse(text) {
            return Some((value, Source::Variable(variable)));
        }
        let message = format!("{text:?} is not {expected} (set in {})", variable.origin);
        self.problems.push(Problem { file: None, line: None, path: name.to_owned(), message });
        None
    }

    /// Where the value at `at` comes from: its line, or the default where the file does not have it.
    pub(super) fn source(&self, at: &At<'_>) -> Source {
        at.node.map_or(Source::Default, |node| Source::File {
            file: at.file.or(self.file).map(Path::to_path_buf),
            line: at.line,
            variables: node.variables.clone(),
        })
    }

    /// Notes a setting's effective value.
    pub(super) fn note(&mut self, at: &At<'_>, value: &impl Serialize, source: Source) {
        let setting = Setting::new(&at.path, value, source);
        self.settings.insert(at.path.clone(), setting);
    }

    /// Notes a problem with the value at `at`.
    pub(super) fn problem(&mut self, at: &At<'_>, message: impl Into<String>) {
        if !self.unexpanded.contains(&at.path) {
            let file = at.file.or(self.file).map(Path::to_path_buf);
            let (line, path, message) = (Some(at.line), at.path.clone(), message.into());
            self.problems.push(Problem { file, line, path, message });
        }
    }

    /// Reads another file, by whose name its problems are noted.
    pub(super) fn within<T>(&mut self, file: &Path, read: impl FnOnce(&mut Self) -> T) -> T {
        self.within = Some(file.to_path_buf());
        let read = read(self);
        self.within = None;
        read
    }

    /// Notes that the variables of a value could not be expanded.
    pub(super) fn unexpanded(&mut self, path: &str, line: usize, message: String) {
        self.unexpanded.insert(path.to_owned());
        self.problem_at(path.to_owned(), Some(line), message);
    }

    /// Notes a problem under a path of its own.
    pub(super) fn problem_at(&mut self, path: String, line: Option<usize>, message: impl Into<String>) {
        let file = self.within.as_deref().or(self.file).filter(|_| line.is_some()).map(Path::to_path_buf);
        self.problems.push(Problem { file, line, path, message: message.into() });
    }

    /// Notes something that works, but that the user should know of.
    pub(super) fn warn(&mut self, at: &At<'_>, message: impl Into<String>) {
        let file = at.file.or(self.file).map(Path::to_path_buf);
        let (line, path, message) = (Some(at.line), at.path.clone(), message.into());
        self.warnings.push(Problem { file, line, path, message });
    }

    /// Notes a problem with a flag if `good` is false.
    pub(super) fn require_flag(&mut self, good: bool, flag: &str, message: &str) {
        if !good {
            self.problem_at(flag.to_owned(), None, message);
        }
    }

    /// Notes a problem if `good` is false.
    pub(super) fn require(&mut self, at: &At<'_>, good: bool, message: &str) {
        if !good {
            self.problem(at, message);
        }
    }
}

/// A question after the known name nearest to `given`, to end a message with; nothing where none is near.
pub(super) fn did_you_mean<'k>(given: &str, known: impl IntoIterator<Item = &'k str>) -> String {
    nearest(given, known).map(|name| format!(", did you mean `{name}`?")).unwrap_or_default()
}

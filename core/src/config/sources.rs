//! Where settings come from: flags, environment, `.env`, the file, or the default.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// The variables a configuration may use: the process's environment, and below it those of a `.env` file. Reading a
/// configuration looks at these alone, never at the process.
#[derive(Clone, Default)]
pub struct Env {
    process: BTreeMap<String, String>,
    dotenv: BTreeMap<String, String>,
}

impl Env {
    /// Variables of the process, and of its `.env` file. Where both set one, the process's counts.
    #[must_use]
    pub const fn new(process: BTreeMap<String, String>, dotenv: BTreeMap<String, String>) -> Self {
        Self { process, dotenv }
    }

    /// The variable's value and where it is set. One that is set to nothing counts as not set, as for `:-` in shells
    /// and in a `.env` file whose lines are not filled in.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(&str, Variable)> {
        [(&self.process, Origin::Environment), (&self.dotenv, Origin::DotEnv)].into_iter().find_map(
            |(variables, origin)| {
                let value = variables.get(name).filter(|value| !value.is_empty())?;
                Some((value.as_str(), Variable { name: name.to_owned(), origin }))
            },
        )
    }
}

/// Names only: values may be secret.
impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |map: &BTreeMap<String, String>| map.keys().cloned().collect::<Vec<_>>();
        f.debug_struct("Env")
            .field("process", &names(&self.process))
            .field("dotenv", &names(&self.dotenv))
            .finish()
    }
}

/// Settings from the command line; they win over all others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    /// `--max-ram-gb`: the budget in GB (10⁹ bytes).
    pub max_ram_gb: Option<f64>,
    /// `--max-concurrent-llms`.
    pub max_concurrent_llms: Option<usize>,
}

/// Where one setting's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A flag of the command line, with its dashes.
    Flag(&'static str),
    /// A variable that stands for this setting by name.
    Variable(Variable),
    /// A line of the configuration.
    File {
        /// The file; `None` for a text without one.
        file: Option<PathBuf>,
        /// The line, from 1.
        line: usize,
        /// The variables whose values were expanded there.
        variables: Vec<Variable>,
    },
    /// Nothing said otherwise.
    Default,
}

/// A variable that was used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Where it is set.
    pub origin: Origin,
}

/// Where a variable is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In the process's environment.
    Environment,
    /// In the `.env` file.
    DotEnv,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "flag {flag}"),
            Self::Variable(variable) => write!(f, "{variable}"),
            Self::File { file, line, variables } => {
                match file {
                    Some(file) => write!(f, "file {}:{line}", file.display())?,
                    None => write!(f, "line {line}")?,
                }
                for variable in variables {
                    write!(f, ", {variable}")?;
                }
                Ok(())
            }
            Self::Default => f.write_str("default"),
        }
    }
}

/// `environment NAME` or `.env NAME`.
impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.origin, self.name)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "environment",
            Self::DotEnv => ".env",
        })
    }
}

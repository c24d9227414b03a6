//! The variables that a configuration may use: the process's and those of a `.env` file.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use sarai_core::config::{ConfigError, Env, Problem};

/// The process's environment above the `.env` file at `dotenv`. A file that is not there is fine. Nothing is set in
/// the process itself.
///
/// # Errors
/// The file is there, but cannot be read or has a line that is no `NAME=value`.
pub fn read(dotenv: &Path) -> Result<Env, ConfigError> {
    let process = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    Ok(Env::new(process.collect(), read_file(dotenv)?))
}

fn read_file(path: &Path) -> Result<BTreeMap<String, String>, ConfigError> {
    // The messages of the parser may show the line, and a line may hold a secret.
    let problem = |what: &str| ConfigError {
        problems: vec![Problem {
            file: Some(path.to_owned()),
            line: None,
            path: String::new(),
            message: what.to_owned(),
        }],
    };
    let lines = match dotenvy::from_path_iter(path) {
        Ok(lines) => lines,
        Err(dotenvy::Error::Io(error)) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(_) => return Err(problem("cannot be read")),
    };
    let pairs = lines
        .enumerate()
        .map(|(entry, line)| line.map_err(|_| problem(&format!("entry {} is not NAME=value", entry + 1))));
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dotenv_file_is_read_and_its_absence_is_fine() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".env");
        assert!(read_file(&path).unwrap().is_empty());
        std::fs::write(&path, "# comment\nOLLAMA_RETRIES=3\nSOLAR_MODEL_NAME=\n").unwrap();
        let read = read_file(&path).unwrap();
        assert_eq!((read["OLLAMA_RETRIES"].as_str(), read["SOLAR_MODEL_NAME"].as_str()), ("3", ""));
    }

    #[test]
    fn a_line_that_is_none_is_named_without_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".env");
        std::fs::write(&path, "GOOD=1\nthis is secret\n").unwrap();
        let message = read_file(&path).unwrap_err().to_string();
        assert!(message.contains("entry 2") && !message.contains("secret"), "{message}");
    }
}

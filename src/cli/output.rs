use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;

use super::exit::Failure;
use super::say;

/// Where results go: text as it comes, or one JSON object at the end.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// A piece of text, shown at once; nothing with `--json`.
    pub(super) fn text(&self, text: &str) -> Result<(), Failure> {
        if self.json { Ok(()) } else { self.bytes(text.as_bytes()) }
    }

    pub(super) fn line(&self, line: &str) -> Result<(), Failure> {
        self.text(&format!("{line}\n"))
    }

    /// The result; only with `--json`.
    pub(super) fn object(&self, object: &impl Serialize) -> Result<(), Failure> {
        if !self.json {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(object);
        let text = text.map_err(|error| unwritable(io::Error::other(error)))?;
        self.bytes(format!("{text}\n").as_bytes())
    }

    pub(super) fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(unwritable)
    }

    /// Remarks beside the result: only for a person.
    pub(super) fn note(&self, line: &str) {
        if !self.json {
            say(line);
        }
    }

    /// What does not keep the command from its work, and should not go unseen.
    pub(super) fn warn(&self, what: &str) {
        let yellow = anstyle::AnsiColor::Yellow.on_default() | anstyle::Effects::BOLD;
        say(&format!("{yellow}warning:{yellow:#} {what}"));
    }

    /// Whether a person is watching stderr.
    pub(super) fn is_watched(&self) -> bool {
        !self.json && io::stderr().is_terminal()
    }

    pub(super) fn fail(&self, failure: &Failure) -> ExitCode {
        if matches!(failure, Failure::Refused(_) | Failure::Checks(_)) {
            // The result has said it.
        } else if self.json {
            // A stdout that is gone leaves only the exit code to tell.
            let _ = self.object(&failure.json());
        } else {
            self.complain(failure);
        }
        ExitCode::from(failure.code())
    }

    /// An error for a person, with what to do about it.
    pub(super) fn complain(&self, failure: &Failure) {
        let red = anstyle::AnsiColor::Red.on_default() | anstyle::Effects::BOLD;
        say(&format!("{red}error:{red:#} {}", failure.message()));
        if let Some(hint) = failure.hint() {
            say(&format!("hint: {hint}"));
        }
    }
}

fn unwritable(source: io::Error) -> Failure {
    Failure::Io { what: "cannot write the result".to_owned(), source }
}

//! The whole: real GGUF files made on the spot, a host that does what the test says, the program itself.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod conversations;
mod errors;
mod hosts;

mod meaning;
mod media;
mod metrics;
mod program;
mod residency;
mod sharing;
mod weights;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use sarai_support::gguf::{Kind, Model, Projector};
use serde_json::Value;
use tempfile::TempDir;

/// A folder with the demo's configuration and models in it.
struct Site {
    folder: TempDir,
}

impl Site {
    fn new() -> Self {
        let site = Self { folder: tempfile::tempdir().unwrap() };
        site.write("config/site.yaml", include_str!("site.yaml"));
        let labels = [("hard", "theorem"), ("soft", "hello"), ("multimodal", "photo")];
        let labels = labels.map(|(label, word)| (label.to_owned(), vec![word.to_owned()])).to_vec();
        for (name, kind) in [
            ("embedding", Kind::GemmaEmbedding),
            ("router", Kind::BertClassifier { labels }),
            ("solar", Kind::Llama),
            ("lfm2", Kind::Lfm2),
            ("omni", Kind::Qwen2Vl),
        ] {
            site.model(name, &Model::new(kind));
        }
        Projector::new(192).write_to(site.path("models/demo/mmproj.gguf")).unwrap();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn model(&self, name: &str, model: &Model) {
        let path = self.path(&format!("models/demo/{name}.gguf"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        model.write_to(path).unwrap();
    }

    /// The program in this folder, with SOLAR's host at `host` and nothing else of this machine's environment.
    fn sarai(&self, host: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("sarai"));
        command.current_dir(self.folder.path()).env_clear();
        // Its caches, too, are the test's own.
        command.env("HOME", self.folder.path()).env("OLLAMA_BASE_URL", host);
        command.args(["--config", "config/site.yaml"]).args(arguments);
        command
    }

    /// The program's object on stdout, its exit code, and what it said on stderr.
    fn json(&self, host: &str, arguments: &[&str]) -> (Value, i32, String) {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        let output = self.sarai(host, &arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let object = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{error}: {} {stderr}", String::from_utf8_lossy(&output.stdout));
        });
        (object, output.status.code().unwrap(), stderr)
    }
}

/// An address on loopback where nobody listens.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// Whether a `served_by` names this file.
fn is_file(served_by: &Value, name: &str) -> bool {
    let path = served_by.as_str().and_then(|text| text.strip_prefix("gguf_native:"));
    path.is_some_and(|path| Path::new(path).ends_with(name))
}

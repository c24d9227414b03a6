//! A pool over files of real models' shapes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use sarai::{Answer, AnswerEvent, CallOptions, GenerateRequest, Sampling, Sarai};
use sarai_support::gguf::Shape;
use serde_json::{Map, Value, json};

use crate::Result;

#[path = "../compare/prompt.rs"]
mod prompt;

/// Where the files are, and how much they may take.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) shapes: PathBuf,
    pub(crate) budget: String,
}

/// A running pool.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) sarai: Sarai,
    /// Its configuration and what it keeps of conversations.
    _folder: tempfile::TempDir,
}

impl Place {
    /// The file of a shape; `copy` is another file of the same content: a model of its own, whose pages nobody else's are.
    pub(crate) fn file(&self, shape: Shape, copy: usize) -> Result<PathBuf> {
        fs::create_dir_all(&self.shapes)?;
        let name = |copy: usize| match copy {
            0 => shape.name().to_owned(),
            copy => format!("{}-{copy}", shape.name()),
        };
        let path = |copy| self.shapes.join(name(copy)).with_added_extension("gguf");
        if !path(0).exists() {
            eprintln!("writing {}", path(0).display());
            shape.write_to(path(0))?;
        }
        if !path(copy).exists() || copy > 0 && is_one_file(&path(0), &path(copy))? {
            eprintln!("copying {}", path(copy).display());
            copy_or_link(&path(0), &path(copy))?;
        }
        Ok(path(copy))
    }

    /// A pool over these models.
    pub(crate) async fn start(&self, models: Map<String, Value>) -> Result<Site> {
        self.start_with(models, json!({})).await
    }

    /// A pool over these models, of which some are on the host `lan`.
    pub(crate) async fn start_with_host(&self, models: Map<String, Value>, url: &str) -> Result<Site> {
        self.start_with(models, json!({"lan": {"kind": "ollama", "url": url}})).await
    }

    async fn start_with(&self, models: Map<String, Value>, hosts: Value) -> Result<Site> {
        let folder = tempfile::tempdir()?;
        let mut memory = json!({"max_concurrent_llms": 6});
        match self.budget.parse::<f64>() {
            Ok(gb) => memory["max_ram_gb"] = json!(gb),
            Err(_) => memory["preset"] = json!(self.budget),
        }
        let config = json!({
            "hosts": hosts,
            "models": models,
            "memory": memory,
            "queue": {"wait_timeout": "1h"},
            "sessions": {"path": folder.path().join("sessions")},
        });
        // JSON is YAML.
        let file = folder.path().join("sarai.yaml");
        fs::write(&file, config.to_string())?;
        let sarai = Sarai::from_file(file).await?;
        Ok(Site { sarai, _folder: folder })
    }
}

fn is_one_file(a: &Path, b: &Path) -> Result<bool> {
    let id = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    Ok(id(a)? == id(b)?)
}

/// Two names of one file where the disk has no room for two.
fn copy_or_link(from: &Path, to: &Path) -> Result<()> {
    let unfinished = to.with_extension("part");
    let copied = fs::copy(from, &unfinished).map(drop).or_else(|error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            eprintln!("there is no room for a copy: {} becomes another name of the same file", to.display());
            fs::remove_file(&unfinished)?;
            fs::hard_link(from, &unfinished)
        }
        _ => Err(error),
    });
    copied.and_then(|()| fs::rename(&unfinished, to))?;
    Ok(())
}

impl Site {
    /// Asks a model for a few tokens after so many words, which begin with `seed`'s.
    pub(crate) async fn ask(&self, model: &str, words: usize, seed: u64) -> Result<Answer> {
        let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(4), ..Sampling::default() };
        let request = GenerateRequest::raw(prompt::words(words, seed)).with_sampling(sampling);
        let mut stream = self.sarai.pool().handle(model)?.generate(request, CallOptions::default()).await?;
        while let Some(event) = stream.next().await {
            if let AnswerEvent::Done(answer) = event? {
                return Ok(answer);
            }
        }
        Err("the answer has no end".into())
    }

    /// Embeds a text.
    pub(crate) async fn embed(&self, model: &str, words: usize, seed: u64) -> Result<()> {
        let handle = self.sarai.pool().handle(model)?;
        handle.embed(vec![prompt::words(words, seed)], CallOptions::default()).await?;
        Ok(())
    }
}

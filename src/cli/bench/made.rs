use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use directories::ProjectDirs;
use sarai::Bytes;
use sarai_support::gguf::{Error, Kind, Model, Projector, Shape, Writer};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::args::ShapeArg;
use crate::cli::exit::Failure;
use crate::cli::say;

/// The width of the full-size Omni's embeddings, and of the tiny models'.
const WIDTHS: (u32, u32) = (3584, 192);

/// Synthetic files, and a configuration for them beside them.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) config: PathBuf,
    /// Of the tiny ones, which go with it.
    _folder: Option<TempDir>,
}

/// A file of a set.
#[derive(Clone, Copy)]
enum File {
    Embedding,
    Solar,
    Lfm2,
    Omni,
    Projector,
}

impl Made {
    /// Makes what is missing of the files, and a configuration: SOLAR's host is not there, so that its file stands in.
    pub(super) async fn make(shape: ShapeArg) -> Result<Self, Failure> {
        // Not on this thread, which listens for Ctrl-C.
        let made = tokio::task::spawn_blocking(move || make(shape)).await;
        made.map_err(io::Error::other).map_err(cannot("make the models".to_owned())).flatten()
    }
}

fn make(shape: ShapeArg) -> Result<Made, Failure> {
    let (folder, temporary) = match shape {
        ShapeArg::Tiny => {
            let temporary = tempfile::tempdir().map_err(cannot("make a temporary folder".to_owned()))?;
            (temporary.path().to_owned(), Some(temporary))
        }
        ShapeArg::Full => {
            let no_home = || Failure::Usage("no home folder to put the models in".to_owned());
            let folder = ProjectDirs::from("", "", "sarai").ok_or_else(no_home)?.cache_dir().join("shapes");
            fs::create_dir_all(&folder).map_err(cannot(format!("make the folder {}", folder.display())))?;
            (folder, None)
        }
    };
    write_missing(shape, &folder)?;
    let config = folder.join("sarai.yaml");
    // JSON is YAML.
    fs::write(&config, configuration(shape).to_string())
        .map_err(cannot(format!("write {}", config.display())))?;
    Ok(Made { config, _folder: temporary })
}

/// A file appears when it is complete: one that is there is as it has to be.
fn write_missing(shape: ShapeArg, folder: &Path) -> Result<(), Failure> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source: Error| Failure::Synthesis { path, source }
    };
    let (mut missing, mut bytes) = (Vec::new(), Bytes::ZERO);
    for file in File::ALL {
        let path = folder.join(file.name(shape));
        if !path.exists() {
            let writer = file.writer(shape).map_err(failed(&path))?;
            bytes += Bytes(writer.tensor_bytes().map_err(failed(&path))?);
            missing.push((path, writer));
        }
    }
    if shape == ShapeArg::Full && !missing.is_empty() {
        say(&format!("writing {bytes} to {}, where they are kept for the next time", folder.display()));
    }
    for (path, writer) in missing {
        writer.create(&path).map_err(failed(&path))?;
    }
    Ok(())
}

fn configuration(shape: ShapeArg) -> Value {
    let local = |file: File, context: u32| json!({"backend": "gguf_native", "path": file.name(shape), "context": context});
    let mut embedding = local(File::Embedding, 512);
    embedding["role"] = json!("embedding");
    embedding["class"] = json!("resident");
    let mut solar = local(File::Solar, 1000);
    solar["backend"] = json!("ollama_http");
    solar["host"] = json!("absent");
    solar["fallback"] = json!("gguf_native");
    let mut omni = local(File::Omni, 2000);
    omni["mmproj"] = json!(File::Projector.name(shape));
    let max_ram_gb = match shape {
        ShapeArg::Tiny => 2.0,
        ShapeArg::Full => 18.0,
    };
    json!({
        // Nothing listens on port 9 of this machine; where something does, it is no Ollama.
        "hosts": {"absent": {"kind": "ollama", "url": "http://127.0.0.1:9", "watch": false}},
        "models": {"embedding": embedding, "solar": solar, "lfm2": local(File::Lfm2, 1000), "omni": omni},
        "memory": {"max_ram_gb": max_ram_gb, "max_concurrent_llms": 3},
        "sessions": {"max_gb": 0},
    })
}

impl File {
    const ALL: [Self; 5] = [Self::Embedding, Self::Solar, Self::Lfm2, Self::Omni, Self::Projector];

    fn name(self, shape: ShapeArg) -> String {
        let name = match (shape, self) {
            (ShapeArg::Tiny, Self::Embedding) => "embedding",
            (ShapeArg::Tiny, Self::Solar) => "solar",
            (ShapeArg::Tiny, Self::Lfm2) => "lfm2",
            (ShapeArg::Tiny, Self::Omni) => "omni",
            (ShapeArg::Tiny, Self::Projector) => "mmproj",
            (ShapeArg::Full, Self::Embedding) => Shape::EmbeddingGemma.name(),
            (ShapeArg::Full, Self::Solar) => Shape::Solar.name(),
            (ShapeArg::Full, Self::Lfm2) => Shape::Lfm2.name(),
            (ShapeArg::Full, Self::Omni) => Shape::Omni7b.name(),
            (ShapeArg::Full, Self::Projector) => "omni-7b-mmproj-f16",
        };
        format!("{name}.gguf")
    }

    /// The file before it is written. Text models never end by themselves.
    fn writer(self, shape: ShapeArg) -> Result<Writer, Error> {
        let endless = |kind: Kind, seed: u64| Model::new(kind).seed(seed).endless(true).writer();
        match (shape, self) {
            (ShapeArg::Tiny, Self::Embedding) => Model::new(Kind::GemmaEmbedding).writer(),
            (ShapeArg::Tiny, Self::Solar) => endless(Kind::Llama, 1),
            (ShapeArg::Tiny, Self::Lfm2) => endless(Kind::Lfm2, 2),
            (ShapeArg::Tiny, Self::Omni) => endless(Kind::Qwen2Vl, 3),
            (ShapeArg::Tiny, Self::Projector) => Ok(Projector::new(WIDTHS.1).writer()),
            (ShapeArg::Full, Self::Embedding) => Ok(Shape::EmbeddingGemma.writer()),
            (ShapeArg::Full, Self::Solar) => Ok(Shape::Solar.writer()),
            (ShapeArg::Full, Self::Lfm2) => Ok(Shape::Lfm2.writer()),
            (ShapeArg::Full, Self::Omni) => Ok(Shape::Omni7b.writer()),
            (ShapeArg::Full, Self::Projector) => Ok(Projector::of_omni_7b(WIDTHS.0).writer()),
        }
    }
}

fn cannot(what: String) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Io { what: format!("cannot {what}"), source }
}

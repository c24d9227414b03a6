//! The models on disk.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sarai_support::gguf::Shape;

use crate::{Result, say};

/// A folder of models.
#[derive(Debug)]
pub(crate) struct Shapes {
    folder: PathBuf,
}

impl Shapes {
    pub(crate) fn at(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        // A configuration's paths are relative to its own folder.
        Ok(Self { folder: fs::canonicalize(folder)? })
    }

    /// The shape's file, written if it is not there, and in the page cache.
    pub(crate) fn file(&self, shape: Shape) -> Result<PathBuf> {
        self.prepared(shape, format!("{}.gguf", shape.name()))
    }

    /// Another file of this shape, which shares no page with the first.
    pub(crate) fn copy(&self, shape: Shape, number: usize) -> Result<PathBuf> {
        self.prepared(shape, format!("{}-{number}.gguf", shape.name()))
    }

    fn prepared(&self, shape: Shape, name: String) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if !path.exists() {
            say(&format!("writing {}", path.display()));
            shape.write_to(&path)?;
        }
        io::copy(&mut File::open(&path)?, &mut io::sink())?;
        Ok(path)
    }
}

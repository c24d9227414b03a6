//! A GGUF version 3 file: metadata, tensor table, tensor data.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::Error;
use super::tensor::Tensor;
use super::value::{Value, put_str};

/// The alignment of tensor data that GGUF takes where the metadata name no other.
const ALIGNMENT: u64 = 32;

/// A GGUF file in the making. Metadata and tensors are written in the order in which they were added; tensor data
/// are streamed row by row.
#[derive(Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
}

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key, in place where it is there already. The alignment is fixed, so `general.alignment` should stay
    /// unset.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.metadata.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key, value)),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find_map(|(k, v)| (k == key).then_some(v))
    }

    /// Takes a key out and returns its value.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.metadata.iter().position(|(k, _)| k == key)?;
        Some(self.metadata.remove(at).1)
    }

    /// Adds a tensor.
    pub fn push(&mut self, tensor: Tensor) {
        self.tensors.push(tensor);
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Takes a tensor out and returns it.
    pub fn remove_tensor(&mut self, name: &str) -> Option<Tensor> {
        let at = self.tensors.iter().position(|t| t.name == name)?;
        Some(self.tensors.remove(at))
    }

    /// The bytes of all tensors as stored, without padding.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a tensor's shape does not go with its type.
    pub fn tensor_bytes(&self) -> Result<u64, Error> {
        self.tensors.iter().map(Tensor::bytes).sum()
    }

    /// Writes the whole file to `out`, which should be buffered. Nothing is written where the file is not well formed.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a misshapen or repeated tensor, [`Error::Write`] where `out` fails.
    pub fn write(&self, mut out: impl Write) -> Result<(), Error> {
        let header = self.header()?;
        self.stream(&header, &mut out).map_err(Error::Write)
    }

    /// The whole file in memory.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a misshapen or repeated tensor.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        Ok(bytes)
    }

    /// Creates or replaces the file at `path`. It appears under that name when it is complete, and not before.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a misshapen or repeated tensor, [`Error::Io`] where the file system refuses.
    pub fn create(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let header = self.header()?;
        self.replace(&header, path).map_err(|source| Error::Io { path: path.to_owned(), source })
    }

    fn header(&self) -> Result<Vec<u8>, Error> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_str(key, &mut out);
            value.encode(&mut out);
        }
        let mut offset = 0;
        for (i, tensor) in self.tensors.iter().enumerate() {
            if self.tensors[..i].iter().any(|t| t.name == tensor.name) {
                return Err(tensor.problem("another tensor has this name"));
            }
            put_str(&tensor.name, &mut out);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(tensor.kind.number().to_le_bytes());
            out.extend(u64::to_le_bytes(offset));
            offset = (offset + tensor.bytes()?).next_multiple_of(ALIGNMENT);
        }
        pad(&mut out);
        Ok(out)
    }

    fn stream(&self, header: &[u8], out: &mut impl Write) -> io::Result<()> {
        out.write_all(header)?;
        let mut numbers = Vec::new();
        let mut encoded = Vec::new();
        for tensor in &self.tensors {
            let mut written = 0;
            for row in 0..tensor.rows() {
                tensor.encode_row(row, &mut numbers, &mut encoded);
                written += encoded.len() as u64;
                out.write_all(&encoded)?;
            }
            let padding = written.next_multiple_of(ALIGNMENT) - written;
            out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
        }
        out.flush()
    }

    fn replace(&self, header: &[u8], path: &Path) -> io::Result<()> {
        let (partial, file) = Partial::beside(path)?;
        // Not synced: whoever loses power makes the file again.
        self.stream(header, &mut BufWriter::with_capacity(1 << 18, file))?;
        partial.rename(path)
    }
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
}

/// A file that is removed again unless it is renamed.
struct Partial {
    path: PathBuf,
    renamed: bool,
}

impl Partial {
    fn beside(path: &Path) -> io::Result<(Self, File)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = path.file_name() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"));
        };
        // Several threads, or processes, may be making the same file.
        let mut partial = name.to_owned();
        partial.push(format!(".{}-{}.part", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let path = path.with_file_name(partial);
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok((Self { path, renamed: false }, file))
    }

    fn rename(mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.renamed {
            // The error that led here is on its way to the caller; there is nobody to tell of a second one.
            let _ = fs::remove_file(&self.path);
        }
    }
}

//! Files with something wrong in them.

use super::error::Error;
use super::tensor::{Tensor, TensorType};
use super::value::{Array, Value};
use super::writer::Writer;

/// Something wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// Only the first bytes are there, this many.
    Truncated(usize),
    /// It does not begin with `GGUF`.
    Magic,
    /// It says that it is of this version, where 3 is right.
    Version(u32),
    /// The last token of the vocabulary has the text of the one before. llama.cpp ends the process over it.
    DuplicateToken,
    /// It says that it has this many blocks. llama.cpp ends the process over 0 and over more than 512.
    BlockCount(u32),
    /// The key is not there.
    MissingKey(String),
    /// The tensor is not there.
    MissingTensor(String),
    /// The key has this number.
    Number(String, u32),
    /// The key has this many numbers, all of them zeros.
    Zeros(String, usize),
    /// The tensor has this shape, the length of a row first, and zeros in it; it may not have been there.
    Shape(String, Vec<u64>),
}

impl Damage {
    pub(crate) fn done_to(&self, mut file: Writer) -> Result<Vec<u8>, Error> {
        let nothing = |what: &str| Error::Damage(what.to_owned());
        match self {
            Self::Truncated(keep) => {
                let mut bytes = file.to_bytes()?;
                if *keep >= bytes.len() {
                    return Err(Error::Damage(format!("the file has only {} bytes", bytes.len())));
                }
                bytes.truncate(*keep);
                Ok(bytes)
            }
            Self::Magic => patched(&file, 0, *b"FUGG"),
            Self::Version(version) => patched(&file, 4, version.to_le_bytes()),
            Self::DuplicateToken => {
                let Some(Value::Array(Array::String(mut tokens))) = file.remove("tokenizer.ggml.tokens")
                else {
                    return Err(nothing("no vocabulary"));
                };
                let [.., one, two] = tokens.as_mut_slice() else {
                    return Err(nothing("fewer than two tokens"));
                };
                two.clone_from(one);
                file.set("tokenizer.ggml.tokens", tokens);
                file.to_bytes()
            }
            Self::BlockCount(n) => {
                let Some(Value::String(arch)) = file.get("general.architecture").cloned() else {
                    return Err(nothing("no architecture"));
                };
                file.set(format!("{arch}.block_count"), *n);
                file.to_bytes()
            }
            Self::MissingKey(key) => {
                file.remove(key).ok_or_else(|| nothing(key))?;
                file.to_bytes()
            }
            Self::MissingTensor(name) => {
                file.remove_tensor(name).ok_or_else(|| nothing(name))?;
                file.to_bytes()
            }
            Self::Number(key, number) => {
                file.set(key.as_str(), *number);
                file.to_bytes()
            }
            Self::Zeros(key, count) => {
                file.set(key.as_str(), vec![0_i32; *count]);
                file.to_bytes()
            }
            Self::Shape(name, shape) => {
                let kind = file.remove_tensor(name).map_or(TensorType::F32, |tensor| tensor.kind());
                file.push(Tensor::new(name.as_str(), shape.as_slice(), kind, |_, _| {}));
                file.to_bytes()
            }
        }
    }
}

fn patched(file: &Writer, at: usize, new: [u8; 4]) -> Result<Vec<u8>, Error> {
    let mut bytes = file.to_bytes()?;
    bytes[at..at + 4].copy_from_slice(&new);
    Ok(bytes)
}

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use crate::Error;

/// What a GGUF file says of itself: its metadata and its tensor table, without the tensors.
///
/// Layout: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little endian.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) path: PathBuf,
    pub(crate) values: BTreeMap<String, Value>,
    pub(crate) tensors: Vec<TensorInfo>,
}

/// A value of the metadata. Numbers are widened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

/// A row of the tensor table.
#[derive(Debug)]
pub(crate) struct TensorInfo {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
    /// `ggml_type`.
    pub(crate) kind: u32,
    pub(crate) bytes: u64,
}

/// Longest text and most entries that are believed. Real files stay far below: vocabularies have some 10⁵ entries,
/// chat templates some 10⁴ characters.
const LONGEST_TEXT: u64 = 16 << 20;
const MOST_ENTRIES: u64 = 8 << 20;
/// What a header may take in memory. One with half a million tokens and as many merges takes 60 MB.
const MOST_BYTES: usize = 256 << 20;

impl Header {
    /// Reads a file up to the end of its tensor table and checks that the tensors lie within the file.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let cannot_read = |source| Error::ReadFile { path: path.to_owned(), source };
        let file = File::open(path).map_err(cannot_read)?;
        let metadata = file.metadata().map_err(cannot_read)?;
        if metadata.is_dir() {
            return Err(bad(path, "is a folder, not a GGUF file"));
        }
        let mut reader = Reader {
            path,
            input: BufReader::with_capacity(1 << 20, file),
            at: 0,
            len: metadata.len(),
            held: 0,
        };
        reader.header()
    }

    /// What of it is needed once llama.cpp has the file: neither its vocabulary and other lists, nor texts and tensors.
    pub(crate) fn into_numbers(mut self) -> Self {
        self.values.retain(|key, value| match value {
            Value::Array(_) => false,
            Value::Text(_) => key == "general.architecture",
            Value::Int(_) | Value::Float(_) | Value::Bool(_) => true,
        });
        Self { tensors: Vec::new(), ..self }
    }

    /// The value of `key` where `{arch}.` stands for the model's architecture.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        match key.strip_prefix("{arch}.") {
            Some(rest) => self.values.get(&format!("{}.{rest}", self.architecture())),
            None => self.values.get(key),
        }
    }

    pub(crate) fn int(&self, key: &str) -> Option<u64> {
        self.value(key).and_then(Value::as_int)
    }

    pub(crate) fn array(&self, key: &str) -> Option<&[Value]> {
        match self.value(key)? {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn architecture(&self) -> &str {
        match self.values.get("general.architecture") {
            Some(Value::Text(architecture)) => architecture,
            _ => "",
        }
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    pub(crate) fn bad(&self, reason: impl Into<String>) -> Error {
        bad(&self.path, reason)
    }
}

impl Value {
    pub(crate) fn as_int(&self) -> Option<u64> {
        match self {
            Self::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
}

fn bad(path: &Path, reason: impl Into<String>) -> Error {
    Error::BadFile { path: path.to_owned(), reason: reason.into() }
}

struct Reader<'a> {
    path: &'a Path,
    input: BufReader<File>,
    at: u64,
    len: u64,
    /// What is in memory of it so far, in bytes.
    held: usize,
}

impl Reader<'_> {
    fn header(&mut self) -> Result<Header, Error> {
        self.magic()?;
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(
                self.bad(format!("is a GGUF file of version {version}; versions 2 and 3 can be read"))
            );
        }
        let tensor_count = self.count("tensors")?;
        let value_count = self.count("metadata entries")?;
        let mut values = BTreeMap::new();
        for _ in 0..value_count {
            self.hold(2 * size_of::<Value>())?;
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(self.bad(format!("has the key {key} twice")));
            }
        }
        let mut tensors = Vec::new();
        let mut ends = 0;
        for _ in 0..tensor_count {
            self.hold(size_of::<TensorInfo>() + size_of::<[u64; 4]>())?;
            let (tensor, offset) = self.tensor()?;
            ends = ends.max(offset.saturating_add(tensor.bytes));
            tensors.push(tensor);
        }
        let alignment = match values.get("general.alignment") {
            Some(value) => value.as_int().filter(|n| n.is_power_of_two() && *n <= 1 << 20),
            None => Some(32),
        };
        let alignment =
            alignment.ok_or_else(|| self.bad("has a general.alignment that is no power of two"))?;
        let data_start = self.at.next_multiple_of(alignment);
        if data_start.saturating_add(ends) > self.len {
            let missing = data_start.saturating_add(ends) - self.len;
            return Err(
                self.bad(format!("is truncated: the last {missing} bytes of its tensors are missing"))
            );
        }
        Ok(Header { path: self.path.to_owned(), values, tensors })
    }

    fn magic(&mut self) -> Result<(), Error> {
        if self.len == 0 {
            return Err(self.bad("is empty"));
        }
        let mut start = [0; 4];
        let length = start.len().min(self.len as usize);
        self.fill(&mut start[..length])?;
        if &start != b"GGUF" {
            let shown = String::from_utf8_lossy(&start[..length]).escape_debug().to_string();
            return Err(self.bad(format!("is not a GGUF file: it starts with \"{shown}\"")));
        }
        Ok(())
    }

    fn tensor(&mut self) -> Result<(TensorInfo, u64), Error> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > 4 {
            return Err(self.bad(format!("has a tensor {name} with {dimensions} dimensions; 4 are the most")));
        }
        let shape = (0..dimensions).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        let kind = self.u32()?;
        let offset = self.u64()?;
        let Some((block, block_bytes)) = block_size(kind) else {
            return Err(self.bad(format!("has a tensor {name} of the unknown type {kind}")));
        };
        let elements = shape.iter().try_fold(1_u64, |product, n| product.checked_mul(*n));
        let bytes = elements.and_then(|n| n.div_ceil(block).checked_mul(block_bytes));
        let bytes = bytes.ok_or_else(|| self.bad(format!("has a tensor {name} of impossible size")))?;
        Ok((TensorInfo { name, shape, kind, bytes }, offset))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, Error> {
        Ok(match kind {
            0 => Value::Int(i128::from(self.bytes::<1>()?[0])),
            1 => Value::Int(i128::from(i8::from_le_bytes(self.bytes()?))),
            2 => Value::Int(i128::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Int(i128::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Int(i128::from(self.u32()?)),
            5 => Value::Int(i128::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes()?))),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < 2 => {
                let kind = self.u32()?;
                let count = self.count("entries of an array")?;
                self.hold(count as usize * size_of::<Value>())?;
                Value::Array((0..count).map(|_| self.value(kind, depth + 1)).collect::<Result<_, _>>()?)
            }
            10 => Value::Int(i128::from(self.u64()?)),
            11 => Value::Int(i128::from(i64::from_le_bytes(self.bytes()?))),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(self.bad(format!("has metadata of the unknown type {kind}"))),
        })
    }

    fn text(&mut self) -> Result<String, Error> {
        let length = self.u64()?;
        if length > LONGEST_TEXT || length > self.len - self.at {
            return Err(self.bad(format!("is truncated or damaged: a text of {length} bytes does not fit")));
        }
        self.hold(length as usize)?;
        let mut text = vec![0; length as usize];
        self.fill(&mut text)?;
        // Vocabularies hold single bytes of characters: such a token is not UTF-8 and need not be.
        Ok(String::from_utf8(text)
            .unwrap_or_else(|e| e.as_bytes().iter().map(|&byte| char::from(byte)).collect()))
    }

    fn count(&mut self, what: &str) -> Result<u64, Error> {
        let count = self.u64()?;
        // Each entry takes a byte at least.
        if count > MOST_ENTRIES || count > self.len - self.at {
            return Err(self.bad(format!("is truncated or damaged: {count} {what} do not fit")));
        }
        Ok(count)
    }

    /// Before so many bytes more are kept: a small part of a file may become many times as much.
    fn hold(&mut self, bytes: usize) -> Result<(), Error> {
        self.held = self.held.saturating_add(bytes);
        if self.held > MOST_BYTES {
            let most = MOST_BYTES >> 20;
            return Err(self
                .bad(format!("is damaged or not a model: its header takes more than {most} MB of memory")));
        }
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        if bytes.len() as u64 > self.len - self.at {
            return Err(
                self.bad(format!("is truncated: it ends after {} bytes, within its header", self.len))
            );
        }
        self.input
            .read_exact(bytes)
            .map_err(|source| Error::ReadFile { path: self.path.to_owned(), source })?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn bad(&self, reason: impl Into<String>) -> Error {
        bad(self.path, reason)
    }
}

/// Elements and bytes of a block of each tensor type, by its number in ggml.h (`ggml_type`, with the block structures of
/// ggml-common.h).
fn block_size(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
        0 | 26 => (1, 4),
        1 | 25 | 30 => (1, 2),
        24 => (1, 1),
        27 | 28 => (1, 8),
        2 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        10 => (256, 84),
        11 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        16 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        20 => (32, 18),
        21 => (256, 110),
        22 => (256, 82),
        23 => (256, 136),
        29 => (256, 56),
        34 => (256, 54),
        35 => (256, 66),
        39 => (32, 17),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use sarai_support::gguf::{Damage, Kind, Model};

    use super::*;

    fn read(bytes: &[u8]) -> Result<Header, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        Header::read(&path)
    }

    #[test]
    fn a_synthetic_model_is_read_with_its_values_and_tensors() {
        let header = read(&Model::new(Kind::Llama).n_embd(384).to_bytes().unwrap()).unwrap();
        assert_eq!(header.architecture(), "llama");
        assert_eq!(header.int("{arch}.embedding_length"), Some(384));
        assert!(header.array("tokenizer.ggml.tokens").unwrap().len() > 256);
        assert_eq!(header.tensor("token_embd.weight").unwrap().shape[0], 384);
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_and_never_a_panic() {
        let whole = Model::new(Kind::Llama).to_bytes().unwrap();
        for length in (0..whole.len()).step_by(997).chain([1, 3, 4, 7, 8, 23, 24, whole.len() - 1]) {
            assert!(read(&whole[..length]).is_err(), "{length} bytes of {}", whole.len());
        }
    }

    #[test]
    fn damage_is_named() {
        let model = Model::new(Kind::Llama);
        let message = |damage| read(&model.damaged(&damage).unwrap()).unwrap_err().to_string();
        assert!(message(Damage::Truncated(0)).ends_with("is empty"));
        assert!(message(Damage::Version(9)).contains("version 9"));
        assert!(message(Damage::Truncated(5000)).contains("truncated"));
        let text = read(b"hello, I am a text file").unwrap_err().to_string();
        assert!(text.ends_with("is not a GGUF file: it starts with \"hell\""), "{text}");
    }

    #[test]
    fn a_header_that_would_grow_beyond_all_measure_is_refused_before_it_does() {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(0_u64.to_le_bytes());
        bytes.extend(4_u64.to_le_bytes());
        for key in ["a", "b", "c", "d"] {
            bytes.extend(1_u64.to_le_bytes());
            bytes.extend(key.as_bytes());
            // An array of bytes, each of which is a value in memory.
            bytes.extend([9_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat());
            bytes.extend((4_u64 << 20).to_le_bytes());
            bytes.resize(bytes.len() + (4 << 20), 0);
        }
        let refused = read(&bytes).unwrap_err();
        assert!(matches!(refused, Error::BadFile { .. }));
        assert!(refused.to_string().contains("its header takes more than 256 MB of memory"), "{refused}");
    }

    #[test]
    fn a_header_is_left_without_vocabulary_and_tensors_once_its_file_is_loaded() {
        let header = read(&Model::new(Kind::Lfm2).to_bytes().unwrap()).unwrap().into_numbers();
        assert_eq!((header.architecture(), header.int("{arch}.block_count")), ("lfm2", Some(4)));
        assert!(header.tensors.is_empty() && header.array("tokenizer.ggml.tokens").is_none());
        assert!(header.text("tokenizer.chat_template").is_none());
    }

    proptest::proptest! {
        #[test]
        fn flipped_bytes_never_panic(flips in proptest::collection::vec((0..4000_usize, 0..=255_u8), 1..8)) {
            let mut bytes = Model::new(Kind::Llama).to_bytes().unwrap();
            for (at, byte) in flips {
                bytes[at] = byte;
            }
            // Whether it is still readable depends on the byte; that it returns at all is what is tested.
            let _either = read(&bytes);
        }
    }
}

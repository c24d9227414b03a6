//! Files as large as real models, to measure with.

mod body;
mod embedding;
mod mix;
mod text;

use std::path::Path;

use super::error::Error;
use super::writer::Writer;

/// A real model's architecture, tensor shapes, tensor types and vocabulary size, with random weights.
///
/// What such a file says is noise, but always the same noise, and it takes the time and memory that the real model would.
/// A text model never ends by itself under greedy decoding: the output rows of special tokens and single bytes are zeros,
/// so that every token is a word. Its vocabulary has the words of the small models, each one token, and filler words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Shape {
    /// LFM2-1.2B, Q4_K_M: 10 convolution and 6 attention blocks, 0.7 GB.
    Lfm2,
    /// SOLAR-10.7B, Q4_K_M: 6.5 GB.
    Solar,
    /// Llama-3.2-1B, Q4_0: 0.8 GB.
    Llama1b,
    /// The language model of Qwen2.5-Omni-7B, Q4_K_M: 4.7 GB.
    Omni7b,
    /// EmbeddingGemma-300M with its dense modules, Q8_0: 0.3 GB.
    EmbeddingGemma,
}

impl Shape {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::Lfm2, Self::Solar, Self::Llama1b, Self::Omni7b, Self::EmbeddingGemma];

    /// A name for the shape's file, without `.gguf`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lfm2 => "lfm2-1.2b-q4_k_m",
            Self::Solar => "solar-10.7b-q4_k_m",
            Self::Llama1b => "llama-1b-q4_0",
            Self::Omni7b => "omni-7b-q4_k_m",
            Self::EmbeddingGemma => "embeddinggemma-300m-q8_0",
        }
    }

    /// Creates or replaces the file at `path`, which appears there when it is complete. It is written as it is made, a
    /// row at a time.
    ///
    /// # Errors
    /// [`Error::Io`] where the file system refuses.
    pub fn write_to(self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.writer().create(path)
    }

    /// The file before it is written, to be changed at will.
    pub fn writer(self) -> Writer {
        match self {
            Self::Lfm2 => text::lfm2(),
            Self::Solar => text::solar(),
            Self::Llama1b => text::llama_1b(),
            Self::Omni7b => text::omni_7b(),
            Self::EmbeddingGemma => embedding::gemma(),
        }
    }
}

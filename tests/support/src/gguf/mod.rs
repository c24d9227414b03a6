//! GGUF files made on the spot: a version 3 [`Writer`], [`Model`]s and a [`Projector`] small enough for a test, and
//! [`Shape`]s as large as real models, to measure with.
//!
//! The small models are real files that llama.cpp loads and runs, byte-identical for equal settings. Their weights are
//! random apart from what makes them useful to look at: the text models speak in words and come to an end, the
//! embedding models put texts with words in common close together, and the classifier knows its labels' keywords.
//! None of them understands anything.
//!
//! ```
//! use sarai_support::gguf::{Kind, Model};
//!
//! let bytes = Model::new(Kind::Llama).seed(7).to_bytes()?;
//! assert_eq!(&bytes[..4], b"GGUF");
//! # Ok::<(), sarai_support::gguf::Error>(())
//! ```

mod bert;
mod damage;
mod decoder;
mod error;
mod gemma;
mod k_quants;
mod model;
mod projector;
mod quants;
mod random;
mod random_blocks;
mod script;
mod shape;
mod tensor;
mod value;
mod vocab;
mod words;
mod writer;

pub use damage::Damage;
pub use error::Error;
pub use model::{Kind, Model};
pub use projector::Projector;
pub use shape::Shape;
pub use tensor::{Tensor, TensorType};
pub use value::{Array, Value};
pub use writer::Writer;

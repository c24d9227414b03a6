//! Image and audio files, read for models in this process: an image becomes pixels (`picture.rs`), audio becomes samples of one
//! channel (`sound.rs`) at the rate that the model wants (`resample.rs`), and a long recording is cut where it is quiet
//! (`cut.rs`). What a file may take in memory is bounded, whatever it says of itself.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::Error;

pub(crate) mod cut;
pub(crate) mod picture;
mod resample;
pub(crate) mod sound;

pub(crate) use picture::Picture;
pub(crate) use sound::Sound;

/// Decodes a file. Where that panics, as decoders do on some damaged files, the file is bad and nothing else is lost: what was
/// worked on is dropped with it.
fn guarded<T>(bad: fn(String) -> Error, decode: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|panic| {
        Err(bad(format!("its decoder panicked{}", said(panic.as_ref()).unwrap_or_default())))
    })
}

/// What a panic says.
fn said(panic: &(dyn Any + Send)) -> Option<String> {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).map(|text| format!(": {text}"))
}

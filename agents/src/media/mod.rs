//! Image and audio files, read for models in this process: an image becomes pixels (`picture.rs`), audio becomes samples of one
//! channel (`sound.rs`) at the rate that the model wants (`resample.rs`), and a long recording is cut where it is quiet
//! (`cut.rs`). What a file may take in memory is bounded, whatever it says of itself.

pub(crate) mod cut;
pub(crate) mod picture;
mod resample;
pub(crate) mod sound;

pub(crate) use picture::Picture;
pub(crate) use sound::Sound;

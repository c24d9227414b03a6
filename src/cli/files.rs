//! Images and audio that are named on the command line.

use std::io::{self, Read};
use std::path::Path;

use sarai::{Audio, Image};

use super::exit::Failure;

/// The image in a file; `-` reads stdin.
pub(super) fn image(path: &Path) -> Result<Image, Failure> {
    Image::new(bytes(path)?).map_err(|error| wrong(path, &error))
}

/// The audio in a file; `-` reads stdin.
pub(super) fn audio(path: &Path) -> Result<Audio, Failure> {
    Audio::new(bytes(path)?).map_err(|error| wrong(path, &error))
}

fn bytes(path: &Path) -> Result<Vec<u8>, Failure> {
    let read = if path == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        std::fs::read(path)
    };
    read.map_err(|source| Failure::Io { what: format!("cannot read {}", path.display()), source })
}

fn wrong(path: &Path, error: &dyn std::error::Error) -> Failure {
    Failure::Usage(format!("{}: {error}", path.display()))
}

//! Files that are named on the command line.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sarai::{Audio, Image};

use super::exit::Failure;

/// More than any image or audio may have: what is larger need not be read to its end to be refused.
const MOST_MEDIA: u64 = 256 << 20;

/// The image in a file; `-` reads stdin.
pub(super) async fn image(path: &Path) -> Result<Image, Failure> {
    Image::new(bytes(path, MOST_MEDIA).await?).map_err(|error| wrong(path, &error))
}

/// The audio in a file; `-` reads stdin.
pub(super) async fn audio(path: &Path) -> Result<Audio, Failure> {
    Audio::new(bytes(path, MOST_MEDIA).await?).map_err(|error| wrong(path, &error))
}

/// The text in a file; `-` reads stdin.
pub(super) async fn text(path: &Path) -> Result<String, Failure> {
    let no_text = |error| Failure::Unreadable { path: path.to_owned(), source: io::Error::other(error) };
    String::from_utf8(bytes(path, u64::MAX).await?).map_err(no_text)
}

async fn bytes(path: &Path, most: u64) -> Result<Vec<u8>, Failure> {
    let file = path.to_owned();
    let read = move || {
        let source: Box<dyn Read> =
            if file == Path::new("-") { Box::new(io::stdin()) } else { Box::new(File::open(file)?) };
        let mut bytes = Vec::new();
        source.take(most).read_to_end(&mut bytes).map(|_| bytes)
    };
    // Not on this thread, which listens for Ctrl-C.
    let read = tokio::task::spawn_blocking(read).await.map_err(io::Error::other).flatten();
    read.map_err(|source| Failure::Unreadable { path: path.to_owned(), source })
}

fn wrong(path: &Path, error: &dyn std::error::Error) -> Failure {
    Failure::Usage(format!("{}: {error}", path.display()))
}

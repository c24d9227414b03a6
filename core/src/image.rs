//! Images for models that see.

use std::fmt;
use std::sync::Arc;

/// The largest file that is taken: what Ollama and most servers of OpenAI's protocol take.
const LARGEST: usize = 20 << 20;

/// An image file's bytes. A cheap clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    bytes: Arc<[u8]>,
    media_type: &'static str,
}

/// Why bytes are no image for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// They begin as none of the formats that are known.
    #[error("it is neither PNG, JPEG, WebP nor GIF")]
    UnknownFormat,
    /// There are too many of them.
    #[error("it has {bytes} bytes, more than the {LARGEST} that are taken")]
    TooLarge {
        /// How many.
        bytes: usize,
    },
}

impl Image {
    /// An image from a file's bytes. Only their beginning is looked at: whether the rest is in order, the model's host finds out.
    ///
    /// # Errors
    /// The bytes begin as no PNG, JPEG, WebP or GIF file does, or there are more than 20 MiB of them.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Result<Self, ImageError> {
        let bytes = bytes.into();
        let media_type = match &*bytes {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => "image/png",
            [0xff, 0xd8, 0xff, ..] => "image/jpeg",
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "image/webp",
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => "image/gif",
            _ => return Err(ImageError::UnknownFormat),
        };
        if bytes.len() > LARGEST {
            return Err(ImageError::TooLarge { bytes: bytes.len() });
        }
        Ok(Self { bytes, media_type })
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its media type, such as `image/png`.
    #[must_use]
    pub const fn media_type(&self) -> &'static str {
        self.media_type
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}, {} bytes)", self.media_type, self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_known_by_its_beginning_and_anything_else_is_refused() {
        let kind = |bytes: &[u8]| Image::new(bytes).map(|image| image.media_type());
        assert_eq!(kind(b"\x89PNG\r\n\x1a\n..."), Ok("image/png"));
        assert_eq!(kind(b"\xff\xd8\xff\xe0"), Ok("image/jpeg"));
        assert_eq!(kind(b"RIFF....WEBPVP8 "), Ok("image/webp"));
        assert_eq!(kind(b"GIF89a"), Ok("image/gif"));
        for other in [&b""[..], b"RIFF....WAVE", b"%PDF", b"hello"] {
            assert_eq!(kind(other), Err(ImageError::UnknownFormat));
        }
        let mut large = vec![0; LARGEST + 1];
        large[..3].copy_from_slice(b"\xff\xd8\xff");
        assert_eq!(kind(&large), Err(ImageError::TooLarge { bytes: LARGEST + 1 }));
    }
}

//! Audio for models that hear.

use std::fmt;
use std::sync::Arc;

/// The largest file that is taken: an hour of speech as most recorders write it (16 bits, one channel, 16 kHz).
const LARGEST: usize = 128 << 20;

/// An audio file's bytes. A cheap clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Audio {
    bytes: Arc<[u8]>,
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Wav,
    Flac,
    Mp3,
    Ogg,
}

/// Why bytes are no audio for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AudioError {
    /// There are none.
    #[error("it is empty")]
    Empty,
    /// They begin as none of the formats that are known.
    #[error("it is neither WAV, FLAC, MP3 nor OGG")]
    UnknownFormat,
    /// There are too many of them.
    #[error("it has {bytes} bytes, more than the {LARGEST} that are taken; cut it into parts")]
    TooLarge {
        /// How many.
        bytes: usize,
    },
}

impl Audio {
    /// Audio from a file's bytes. Only their beginning is looked at: whether the rest is in order, whoever decodes it finds
    /// out.
    ///
    /// # Errors
    /// There are no bytes, they begin as no WAV, FLAC, MP3 or OGG file does, or there are more than 128 MiB of them.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Result<Self, AudioError> {
        let bytes = bytes.into();
        let format = match &*bytes {
            [] => return Err(AudioError::Empty),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E', ..] => Format::Wav,
            [b'f', b'L', b'a', b'C', ..] => Format::Flac,
            [b'O', b'g', b'g', b'S', ..] => Format::Ogg,
            // A tag, or a frame of layer III: eleven bits of sync, a version that is not reserved.
            [b'I', b'D', b'3', ..] => Format::Mp3,
            [0xff, second, ..] if second & 0xe6 == 0xe2 && second & 0x18 != 0x08 => Format::Mp3,
            _ => return Err(AudioError::UnknownFormat),
        };
        if bytes.len() > LARGEST {
            return Err(AudioError::TooLarge { bytes: bytes.len() });
        }
        Ok(Self { bytes, format })
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its media type, such as `audio/wav`.
    #[must_use]
    pub const fn media_type(&self) -> &'static str {
        match self.format {
            Format::Wav => "audio/wav",
            Format::Flac => "audio/flac",
            Format::Mp3 => "audio/mpeg",
            Format::Ogg => "audio/ogg",
        }
    }

    /// What its file's name ends in, such as `wav`: also the name of its format in OpenAI's API.
    #[must_use]
    pub const fn extension(&self) -> &'static str {
        match self.format {
            Format::Wav => "wav",
            Format::Flac => "flac",
            Format::Mp3 => "mp3",
            Format::Ogg => "ogg",
        }
    }
}

impl AsRef<[u8]> for Audio {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for Audio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Audio({}, {} bytes)", self.media_type(), self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_known_by_its_beginning_and_anything_else_is_refused() {
        let kind = |bytes: &[u8]| Audio::new(bytes).map(|audio| audio.extension());
        assert_eq!(kind(b"RIFF....WAVEfmt "), Ok("wav"));
        assert_eq!(kind(b"fLaC...."), Ok("flac"));
        assert_eq!(kind(b"OggS...."), Ok("ogg"));
        assert_eq!(kind(b"ID3\x04"), Ok("mp3"));
        assert_eq!(kind(b"\xff\xfb\x90\x00"), Ok("mp3"));
        for other in [&b"RIFF....WEBP"[..], b"\xff\xd8\xff\xe0", b"Hello, world", b"\x89PNG", b"\xff"] {
            assert_eq!(kind(other), Err(AudioError::UnknownFormat), "{other:?}");
        }
        assert_eq!(kind(b""), Err(AudioError::Empty));
        let mut large = vec![0; LARGEST + 1];
        large[..4].copy_from_slice(b"fLaC");
        assert_eq!(kind(&large), Err(AudioError::TooLarge { bytes: LARGEST + 1 }));
    }
}

//! Audio files as samples.

use std::io::{Cursor, ErrorKind};
use std::time::Duration;

use sarai_core::audio::Audio;
use symphonia::core::audio::GenericAudioBufferRef;
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::errors::Error as Reported;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

use super::resample::Resampler;
use crate::Error;

/// The longest recording that is read: 115 MB of samples at 16 kHz.
const LONGEST: Duration = Duration::from_mins(30);
/// Rates that are believed, in samples a second: from less than a telephone's to more than a studio's.
const RATES: std::ops::RangeInclusive<u32> = 1000..=768_000;

/// What is heard: samples of one channel, from -1 to 1.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sound {
    pub(crate) samples: Vec<f32>,
    /// Samples a second.
    pub(crate) rate: u32,
}

/// Reads an audio file: several channels are mixed, and another rate is changed to `rate`.
pub(crate) fn decode(audio: &Audio, rate: u32) -> Result<Sound, Error> {
    super::guarded(|reason| Error::BadAudio { reason }, || decode_file(audio, rate))
}

fn decode_file(audio: &Audio, rate: u32) -> Result<Sound, Error> {
    let bad = |reason: Reported| Error::BadAudio { reason: reason.to_string() };
    let stream = MediaSourceStream::new(Box::new(Cursor::new(audio.bytes())), Default::default());
    let mut hint = Hint::new();
    hint.with_extension(audio.extension());
    let mut format = symphonia::default::get_probe()
        .probe(&hint, stream, FormatOptions::default(), MetadataOptions::default())
        .map_err(bad)?;
    let no_track = || Error::BadAudio { reason: "it has no audio track that can be read".to_owned() };
    let track = format.first_track_known_codec(TrackType::Audio).ok_or_else(no_track)?;
    let (id, params) = (track.id, track.codec_params.clone());
    let params = params.as_ref().and_then(|params| params.audio()).ok_or_else(no_track)?;
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(params, &AudioDecoderOptions::default())
        .map_err(bad)?;
    let mut mix = Mix::new(rate);
    loop {
        let packet = match format.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => break,
            // Whoever streams a file writes its length before it is known, and a recorder that is switched off does not
            // write the rest of the last part.
            Err(Reported::IoError(error)) if error.kind() == ErrorKind::UnexpectedEof && mix.begun() => {
                tracing::debug!("the audio ends before its header says");
                break;
            }
            Err(error) => return Err(bad(error)),
        };
        if packet.track_id != id {
            continue;
        }
        match decoder.decode(&packet) {
            Ok(decoded) => mix.add(&decoded)?,
            // A stream that was cut out of another begins with parts that need what was before them.
            Err(Reported::DecodeError(reason)) if !mix.begun() => tracing::debug!(reason, "left out"),
            Err(error) => return Err(bad(error)),
        }
    }
    let samples = mix.end()?;
    if samples.is_empty() { Err(Error::EmptyAudio) } else { Ok(Sound { samples, rate }) }
}

/// What was decoded so far, mixed to one channel at the rate that is wanted.
struct Mix {
    rate: u32,
    /// Made when the file's own rate is known.
    resampler: Option<Resampler>,
    frames: Vec<f32>,
    mono: Vec<f32>,
}

impl Mix {
    fn new(rate: u32) -> Self {
        Self { rate, resampler: None, frames: Vec::new(), mono: Vec::new() }
    }

    fn begun(&self) -> bool {
        self.resampler.is_some()
    }

    fn add(&mut self, decoded: &GenericAudioBufferRef<'_>) -> Result<(), Error> {
        let (rate, channels) = (decoded.spec().rate(), decoded.spec().channels().count());
        if !RATES.contains(&rate) || channels == 0 {
            return Err(Error::BadAudio { reason: format!("it has {channels} channels at {rate} Hz") });
        }
        if decoded.frames() == 0 {
            return Ok(());
        }
        let resampler = match &mut self.resampler {
            Some(resampler) => resampler,
            none => none.insert(Resampler::new(rate, self.rate)?),
        };
        if resampler.from() != rate {
            return Err(Error::BadAudio { reason: "its rate changes in the middle".to_owned() });
        }
        decoded.copy_to_vec_interleaved(&mut self.frames);
        if !self.frames.iter().all(|sample| sample.is_finite()) {
            return Err(Error::BadAudio { reason: "it has samples that are no numbers".to_owned() });
        }
        self.mono.clear();
        let mean = |frame: &[f32]| frame.iter().sum::<f32>() / channels as f32;
        self.mono.extend(self.frames.chunks_exact(channels).map(mean));
        resampler.push(&self.mono)?;
        if resampler.taken() > LONGEST.as_secs() * u64::from(rate) {
            return Err(Error::AudioTooLong { longest: LONGEST });
        }
        Ok(())
    }

    fn end(self) -> Result<Vec<f32>, Error> {
        self.resampler.map_or(Ok(Vec::new()), Resampler::end)
    }
}

#[cfg(test)]
mod tests {
    use std::f32::consts::TAU;

    use hound::{SampleFormat, WavSpec, WavWriter};
    use proptest::prelude::*;

    use super::*;

    const TONE: f32 = 440.0;

    fn wav(rate: u32, channels: u16, bits: u16, format: SampleFormat, seconds: f32) -> Audio {
        let spec = WavSpec { channels, sample_rate: rate, bits_per_sample: bits, sample_format: format };
        let mut file = Cursor::new(Vec::new());
        let mut writer = WavWriter::new(&mut file, spec).unwrap();
        for n in 0..(seconds * rate as f32) as u32 {
            let sample = (n as f32 / rate as f32 * TONE * TAU).sin() * 0.5;
            for _ in 0..channels {
                match format {
                    SampleFormat::Float => writer.write_sample(sample).unwrap(),
                    SampleFormat::Int => {
                        writer.write_sample((sample * (1_i64 << (bits - 1)) as f32 * 0.999) as i32).unwrap();
                    }
                }
            }
        }
        writer.finalize().unwrap();
        Audio::new(file.into_inner()).unwrap()
    }

    /// How much of the samples is the tone: 1 for nothing else.
    fn likeness(sound: &Sound) -> f32 {
        let at = |n: usize| n as f32 / sound.rate as f32 * TONE * TAU;
        let part = |wave: fn(f32) -> f32| {
            sound.samples.iter().enumerate().map(|(n, sample)| sample * wave(at(n))).sum::<f32>()
        };
        let power: f32 = sound.samples.iter().map(|sample| sample * sample).sum();
        let (sine, cosine) = (part(f32::sin), part(f32::cos));
        ((sine * sine + cosine * cosine) / power / (sound.samples.len() as f32 / 2.0)).sqrt()
    }

    #[test]
    fn wavs_of_all_sorts_are_the_same_tone_at_the_rate_that_is_wanted() {
        for rate in [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000] {
            for channels in [1, 2, 6] {
                for (bits, format) in [
                    (8, SampleFormat::Int),
                    (16, SampleFormat::Int),
                    (24, SampleFormat::Int),
                    (32, SampleFormat::Int),
                    (32, SampleFormat::Float),
                ] {
                    let sound = decode(&wav(rate, channels, bits, format, 1.0), 16_000).unwrap();
                    let what = format!("{rate} Hz, {channels} channels, {bits} bits {format:?}");
                    assert!(sound.samples.len().abs_diff(16_000) <= 1, "{what}: {}", sound.samples.len());
                    // 8 bits round by a two hundred and fiftieth.
                    assert!(likeness(&sound) > 0.99, "{what}: {}", likeness(&sound));
                    let loudest = sound.samples.iter().fold(0.0_f32, |most, sample| most.max(sample.abs()));
                    assert!((0.45..0.6).contains(&loudest), "{what}: {loudest}");
                }
            }
        }
    }

    fn refusal(bytes: Vec<u8>) -> Error {
        decode(&Audio::new(bytes).unwrap(), 16_000).unwrap_err()
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        assert!(matches!(refusal(b"RIFF....WAVEand this is text".to_vec()), Error::BadAudio { .. }));
        assert!(matches!(refusal(b"fLaC".to_vec()), Error::BadAudio { .. }));
        assert!(matches!(refusal(b"OggS\0\x02".to_vec()), Error::BadAudio { .. }));
        assert!(matches!(refusal(b"ID3\x04\0\0\0\0\0\0".to_vec()), Error::BadAudio { .. }));
        let empty = wav(16_000, 1, 16, SampleFormat::Int, 0.0);
        assert!(matches!(decode(&empty, 16_000), Err(Error::EmptyAudio)));
        let spec = WavSpec {
            channels: 1,
            sample_rate: 16_000,
            bits_per_sample: 32,
            sample_format: SampleFormat::Float,
        };
        let mut file = Cursor::new(Vec::new());
        let mut writer = WavWriter::new(&mut file, spec).unwrap();
        for sample in [0.1, f32::NAN] {
            writer.write_sample(sample).unwrap();
        }
        writer.finalize().unwrap();
        assert!(refusal(file.into_inner()).to_string().contains("no numbers"));
    }

    #[test]
    fn a_recording_that_was_switched_off_is_read_as_far_as_it_goes() {
        let whole = wav(16_000, 1, 16, SampleFormat::Int, 2.0);
        let half = Audio::new(whole.bytes()[..whole.bytes().len() / 2].to_vec()).unwrap();
        let sound = decode(&half, 16_000).unwrap();
        assert!((15_000..=16_000).contains(&sound.samples.len()), "{}", sound.samples.len());
    }

    #[test]
    fn three_hours_are_too_long_and_never_held() {
        // 8 bits at 1 kHz: 10.8 MB.
        let long = wav(1000, 1, 8, SampleFormat::Int, 3.0 * 3600.0);
        assert!(matches!(decode(&long, 16_000), Err(Error::AudioTooLong { .. })));
    }

    #[test]
    fn a_file_that_its_decoder_panics_at_is_a_bad_file() {
        // 0x8001 channels of two bytes are more than the decoder's 16 bits hold.
        let mut bytes = wav(16_000, 1, 16, SampleFormat::Int, 0.125).bytes().to_vec();
        bytes[23] = 0x80;
        let error = decode(&Audio::new(bytes).unwrap(), 16_000).unwrap_err();
        assert!(matches!(&error, Error::BadAudio { reason } if reason.contains("overflow")), "{error}");
    }

    proptest! {
        #[test]
        fn changed_bytes_never_make_it_panic(
            changes in prop::collection::vec((0..4000_usize, any::<u8>()), 1..12), cut in 12..4044_usize
        ) {
            let mut bytes = wav(16_000, 1, 16, SampleFormat::Int, 0.125).bytes().to_vec();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes.truncate(cut);
            if let Ok(audio) = Audio::new(bytes) {
                // Whether it is still in order depends on the byte.
                let _either = decode(&audio, 16_000);
            }
        }

        #[test]
        fn noise_of_any_format_never_makes_it_panic(
            beginning in prop::sample::select(vec![&b"fLaC"[..], b"OggS", b"ID3\x03", b"\xff\xfb\x90\x64"]),
            noise in prop::collection::vec(any::<u8>(), 0..600)
        ) {
            let audio = Audio::new([beginning, &noise].concat()).unwrap();
            let _either = decode(&audio, 16_000);
        }
    }
}

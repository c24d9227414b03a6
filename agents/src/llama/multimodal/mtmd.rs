//! llama.cpp's library for images and audio. The binding's own wrapper does not give the embeddings out, which this engine
//! puts into steps of its own.

#![expect(unsafe_code, reason = "calls into llama.cpp; every block says why it is sound")]

use std::ffi::CStr;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

use super::super::context::{c_path, compute};
use super::super::load::Loaded;
use super::super::projector::MOST_IMAGE_TOKENS;
use super::super::runtime;
use super::embedded::{Embedded, Piece};
use crate::Error;
use crate::media::{Picture, Sound};

/// Names of markers that this library puts around images, and what some of the vocabularies that they are meant for call
/// them: Qwen2.5-Omni's has no `<|vision_start|>`, which would be read letter by letter.
const OTHER_NAMES: [(&str, &str); 2] =
    [("<|vision_start|>", "<|vision_bos|>"), ("<|vision_end|>", "<|vision_eos|>")];

/// A loaded projector.
pub(super) struct Mtmd {
    raw: NonNull<sys::mtmd_context>,
    /// The projector looks into the model's vocabulary for as long as it lives.
    loaded: Arc<Loaded>,
    width: usize,
    /// Tokens of a step of the model's.
    n_batch: usize,
}

// SAFETY: the library's context belongs to no thread; `&mut` keeps it to one at a time.
unsafe impl Send for Mtmd {}

/// What a projector is asked to turn into embeddings.
#[derive(Debug)]
pub(super) enum Seen {
    Picture(Picture),
    Sound(Sound),
}

impl Mtmd {
    /// Loads a projector whose header was checked for this model.
    pub(super) fn load(
        path: &Path,
        loaded: &Arc<Loaded>,
        (threads, n_batch): (usize, usize),
        any_size: bool,
    ) -> Result<Self, Error> {
        runtime::backend()?;
        let failed = || Error::LoadFailed { path: path.to_owned() };
        let file = c_path(path).ok_or_else(failed)?;
        // SAFETY: a plain function that returns a struct of defaults.
        let mut params = unsafe { sys::mtmd_context_params_default() };
        params.use_gpu = cfg!(any(feature = "cuda", feature = "metal", feature = "vulkan"));
        params.print_timings = false;
        params.n_threads = i32::try_from(threads).unwrap_or(1);
        if any_size {
            params.image_max_tokens = MOST_IMAGE_TOKENS as i32;
        }
        // SAFETY: the path is a C string, the parameters hold the defaults' static texts, and the model outlives the projector,
        // which holds a share of it.
        let raw = loaded
            .changing(|model| unsafe { sys::mtmd_init_from_file(file.as_ptr(), model.as_ptr(), params) });
        // SAFETY: the model is live.
        let width = unsafe { sys::llama_model_n_embd_inp(loaded.raw().as_ptr()) };
        let width = usize::try_from(width).ok().filter(|width| *width > 0).ok_or_else(failed)?;
        Ok(Self { raw: NonNull::new(raw).ok_or_else(failed)?, loaded: Arc::clone(loaded), width, n_batch })
    }

    /// Samples a second that it wants of audio, where it hears.
    pub(super) fn sample_rate(&self) -> Option<u32> {
        // SAFETY: the context is live.
        let rate = unsafe { sys::mtmd_get_audio_sample_rate(self.raw.as_ptr()) };
        u32::try_from(rate).ok().filter(|rate| *rate > 0)
    }

    /// What stands in a prompt for an image or audio, with the same `id` for the same content. `may_take` is asked, with the
    /// number of embeddings, before they are computed, which takes long.
    pub(super) fn encode(
        &mut self,
        seen: &Seen,
        id: u64,
        may_take: impl Fn(usize) -> Result<(), Error>,
    ) -> Result<Vec<Piece>, Error> {
        let chunks = self.cut(seen)?;
        let all = || (0..chunks.len()).filter_map(|at| chunks.get(at));
        may_take(all().map(|chunk| chunk.tokens()).sum())?;
        // llama.cpp ends the process for what does not fit.
        if let Some(large) = all().find(|chunk| !self.is_causal(chunk) && chunk.tokens() > self.n_batch) {
            let (tokens, most) = (large.tokens(), self.n_batch);
            return Err(compute(format!(
                "an image of {tokens} tokens, which have to be computed at once, is more than a step's {most}"
            )));
        }
        let mut pieces = Vec::new();
        for (at, chunk) in all().enumerate() {
            let own_id = id.wrapping_add(at as u64);
            pieces.push(match chunk.text() {
                Some(tokens) => Piece::Tokens(self.marker(tokens)),
                None => Piece::Embedded(Arc::new(self.embed(&chunk, own_id)?)),
            });
        }
        Ok(pieces)
    }

    /// Prepares an image or audio: its size, its parts, its spectrum.
    fn cut(&self, seen: &Seen) -> Result<Chunks, Error> {
        let bitmap = Bitmap::of(seen)?;
        let chunks = Chunks::new()?;
        // SAFETY: the library gives a text that ends with a NUL and lives as long as the context.
        let marker = unsafe { CStr::from_ptr(sys::mtmd_get_marker(self.raw.as_ptr())) };
        let text = sys::mtmd_input_text {
            text: marker.as_ptr(),
            text_len: marker.to_bytes().len(),
            add_special: false,
            parse_special: true,
        };
        let mut bitmaps = [bitmap.0.as_ptr().cast_const()];
        // SAFETY: everything is live through the call; there is one bitmap, as said, and one marker in the text.
        let code = unsafe {
            sys::mtmd_tokenize(
                self.raw.as_ptr(),
                chunks.0.as_ptr(),
                &raw const text,
                bitmaps.as_mut_ptr(),
                bitmaps.len(),
            )
        };
        match code {
            0 => Ok(chunks),
            code => Err(compute(format!("mtmd_tokenize gave {code}"))),
        }
    }

    fn embed(&mut self, chunk: &Chunk<'_>, id: u64) -> Result<Embedded, Error> {
        let rows = chunk.tokens();
        // SAFETY: context and chunk are live.
        let code = unsafe { sys::mtmd_encode_chunk(self.raw.as_ptr(), chunk.raw) };
        if code != 0 {
            return Err(compute(format!("mtmd_encode_chunk gave {code}")));
        }
        // SAFETY: after a chunk was encoded, the library keeps a row of the text model's width for each of its tokens until
        // the next one is; that the widths are the same was checked when the projector was loaded.
        let values = unsafe {
            let first = sys::mtmd_get_output_embd(self.raw.as_ptr());
            if first.is_null() {
                return Err(compute("there are no embeddings"));
            }
            std::slice::from_raw_parts(first, rows * self.width)
        };
        if !values.iter().all(|value| value.is_finite()) {
            return Err(compute("the projector gave embeddings that are no numbers"));
        }
        // SAFETY: the context is live.
        let four_axes = unsafe { sys::mtmd_decode_use_mrope(self.raw.as_ptr()) };
        let causal = self.is_causal(chunk);
        let grid = if four_axes { chunk.grid()? } else { None };
        Ok(Embedded::new(values.to_vec(), self.width, grid, chunk.positions(), causal, id))
    }

    /// Whether each of a chunk's embeddings attends to those before it alone.
    fn is_causal(&self, chunk: &Chunk<'_>) -> bool {
        // SAFETY: context and chunk are live.
        chunk.text().is_some() || unsafe { !sys::mtmd_decode_use_non_causal(self.raw.as_ptr(), chunk.raw) }
    }

    /// The tokens of a marker, by the name that the vocabulary has for it.
    fn marker(&self, tokens: &[LlamaToken]) -> Vec<LlamaToken> {
        let vocab = self.loaded.model().vocab();
        if tokens.len() > 1 {
            let bytes: Vec<u8> =
                tokens.iter().flat_map(|token| vocab.token_to_piece(*token, true, None)).collect();
            let text = String::from_utf8_lossy(&bytes);
            let other = OTHER_NAMES.iter().find(|(name, _)| *name == text.trim());
            let other = other.map(|(_, other)| vocab.tokenize(other.as_bytes(), false, true));
            if let Some(other) = other.filter(|other| other.len() == 1) {
                return other;
            }
        }
        tokens.to_vec()
    }
}

impl Drop for Mtmd {
    fn drop(&mut self) {
        // SAFETY: it is freed once, before its share of the model is.
        unsafe { sys::mtmd_free(self.raw.as_ptr()) }
    }
}

struct Bitmap(NonNull<sys::mtmd_bitmap>);

impl Bitmap {
    fn of(seen: &Seen) -> Result<Self, Error> {
        let raw = match seen {
            Seen::Picture(picture) => {
                let bytes = u64::from(picture.width) * u64::from(picture.height) * 3;
                if picture.rgb.len() as u64 != bytes || bytes > u32::MAX.into() || bytes == 0 {
                    return Err(compute("an image has not as many bytes as pixels"));
                }
                // SAFETY: there are three bytes for each pixel, as the library reads them.
                unsafe { sys::mtmd_bitmap_init(picture.width, picture.height, picture.rgb.as_ptr()) }
            }
            Seen::Sound(sound) => {
                // The library's own checks end the process for fewer.
                if sound.samples.len() < 2 {
                    return Err(Error::EmptyAudio);
                }
                // SAFETY: the samples are as many as said.
                unsafe { sys::mtmd_bitmap_init_from_audio(sound.samples.len(), sound.samples.as_ptr()) }
            }
        };
        NonNull::new(raw).map(Self).ok_or_else(|| compute("there is no room for an image or audio"))
    }
}

impl Drop for Bitmap {
    fn drop(&mut self) {
        // SAFETY: it is freed once.
        unsafe { sys::mtmd_bitmap_free(self.0.as_ptr()) }
    }
}

struct Chunks(NonNull<sys::mtmd_input_chunks>);

impl Chunks {
    fn new() -> Result<Self, Error> {
        // SAFETY: a plain function that makes an empty list.
        let raw = unsafe { sys::mtmd_input_chunks_init() };
        NonNull::new(raw).map(Self).ok_or_else(|| compute("there is no room for an image or audio"))
    }

    fn len(&self) -> usize {
        // SAFETY: the list is live.
        unsafe { sys::mtmd_input_chunks_size(self.0.as_ptr()) }
    }

    fn get(&self, at: usize) -> Option<Chunk<'_>> {
        // SAFETY: the list is live, and `at` below its length (the library checks neither).
        let raw = (at < self.len()).then(|| unsafe { sys::mtmd_input_chunks_get(self.0.as_ptr(), at) })?;
        (!raw.is_null()).then_some(Chunk { raw, of: self })
    }
}

impl Drop for Chunks {
    fn drop(&mut self) {
        // SAFETY: it is freed once, with all that is in it.
        unsafe { sys::mtmd_input_chunks_free(self.0.as_ptr()) }
    }
}

/// A part of what an image or audio was cut into, or a marker beside it.
struct Chunk<'c> {
    raw: *const sys::mtmd_input_chunk,
    /// Owns it.
    #[expect(dead_code, reason = "keeps the list alive")]
    of: &'c Chunks,
}

impl Chunk<'_> {
    fn tokens(&self) -> usize {
        // SAFETY: the chunk is live.
        unsafe { sys::mtmd_input_chunk_get_n_tokens(self.raw) }
    }

    fn positions(&self) -> usize {
        // SAFETY: the chunk is live.
        usize::try_from(unsafe { sys::mtmd_input_chunk_get_n_pos(self.raw) }).unwrap_or(0)
    }

    /// Its tokens, where it is a marker.
    fn text(&self) -> Option<&[LlamaToken]> {
        // SAFETY: the chunk is live. One of another type gives null.
        unsafe {
            if sys::mtmd_input_chunk_get_type(self.raw) != sys::MTMD_INPUT_CHUNK_TYPE_TEXT {
                return None;
            }
            let mut length = 0;
            let first = sys::mtmd_input_chunk_get_tokens_text(self.raw, &raw mut length);
            if first.is_null() || length == 0 {
                return Some(&[]);
            }
            // `LlamaToken` is a transparent `llama_token`, and the tokens live as long as the chunk.
            Some(std::slice::from_raw_parts(first.cast(), length))
        }
    }

    /// Where an image's embeddings stand; `None` for audio, whose stand one after another.
    fn grid(&self) -> Result<Option<Vec<[i32; 4]>>, Error> {
        // SAFETY: the chunk is live; one that is no image gives null.
        let image = unsafe { sys::mtmd_input_chunk_get_tokens_image(self.raw) };
        if image.is_null() {
            return Ok(None);
        }
        let at = |from: i32, at: usize| {
            // SAFETY: the image is live, and `at` below the number of its tokens.
            let place = unsafe { sys::mtmd_image_tokens_get_decoder_pos(image, from, at) };
            [place.t, place.y, place.x, place.z].map(|axis| i32::try_from(axis).unwrap_or(i32::MAX))
        };
        let grid: Vec<[i32; 4]> = (0..self.tokens()).map(|token| at(0, token)).collect();
        // One and the same grid wherever the image begins: `Embedded::axes` counts on it.
        let moves = |(token, own): (usize, &[i32; 4])| {
            let [time, down, across, fourth] = *own;
            at(1, token) == [time + 1, down + 1, across + 1, fourth]
        };
        if !grid.iter().enumerate().all(moves) {
            return Err(compute("images of this projector have positions that are not known here"));
        }
        Ok(Some(grid))
    }
}

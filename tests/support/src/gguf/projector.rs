//! A projector: what turns pictures and sound into a text model's embeddings.

use std::path::Path;

use super::damage::Damage;
use super::error::Error;
use super::random::Random;
use super::tensor::{Tensor, TensorType};
use super::value::Value;
use super::writer::Writer;

/// A small projector in the form of Qwen2.5-Omni's, in the making: a vision tower and an audio tower in one file, with
/// random weights.
#[derive(Clone, Debug)]
pub struct Projector {
    n_embd: u32,
    seed: u64,
}

/// Blocks of each tower, the width of its state and of its feed-forward networks, its heads.
const BLOCKS: u32 = 2;
const WIDTH: u32 = 64;
const FEED_FORWARD: u32 = 128;
const HEADS: u32 = 4;
/// Pixels of a patch's side, and frequencies of sound.
const PATCH: u32 = 14;
const MEL_BINS: u32 = 128;
/// Half a minute of sound, which llama.cpp always fills.
const POSITIONS: u32 = 1500;

impl Projector {
    /// A projector for a text model of this width.
    pub fn new(n_embd: u32) -> Self {
        Self { n_embd, seed: 0 }
    }

    /// Decides every weight.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Creates or replaces the file at `path`, which appears there when it is complete.
    ///
    /// # Errors
    /// [`Error::Io`] where the file system refuses.
    pub fn write_to(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.writer().create(path)
    }

    /// The file with something wrong in it, in memory.
    ///
    /// # Errors
    /// [`Error::Damage`] where the file has nothing that could be damaged like this.
    pub fn damaged(&self, damage: &Damage) -> Result<Vec<u8>, Error> {
        damage.done_to(self.writer())
    }

    /// The file before it is written, to be changed at will.
    pub fn writer(&self) -> Writer {
        let mut build = Build { writer: Writer::new(), seed: self.seed };
        let w = &mut build.writer;
        w.set("general.architecture", "clip");
        w.set("general.type", "mmproj");
        w.set("general.name", "synthetic projector");
        w.set("general.file_type", TensorType::F16.file_type());
        for (key, value) in [("use_silu", true), ("has_vision_encoder", true), ("has_audio_encoder", true)] {
            w.set(format!("clip.{key}"), value);
        }
        w.set("clip.projector_type", "qwen2.5o");
        for (tower, epsilon) in [("vision", 1e-6_f32), ("audio", 1e-5)] {
            let mut key = |name: &str, value: Value| w.set(format!("clip.{tower}.{name}"), value);
            key("block_count", BLOCKS.into());
            key("embedding_length", WIDTH.into());
            key("feed_forward_length", FEED_FORWARD.into());
            key("projection_dim", self.n_embd.into());
            key("attention.head_count", HEADS.into());
            key("attention.layer_norm_epsilon", epsilon.into());
        }
        w.set("clip.vision.image_size", 560_u32);
        w.set("clip.vision.patch_size", PATCH);
        w.set("clip.vision.n_wa_pattern", 2_u32);
        w.set("clip.vision.image_mean", vec![0.5_f32; 3]);
        w.set("clip.vision.image_std", vec![0.25_f32; 3]);
        w.set("clip.audio.num_mel_bins", MEL_BINS);
        build.vision(self.n_embd);
        build.audio(self.n_embd);
        build.writer
    }
}

struct Build {
    writer: Writer,
    seed: u64,
}

impl Build {
    fn vision(&mut self, n_embd: u32) {
        // The two pictures that a patch takes together.
        for end in ["", ".1"] {
            self.random(format!("v.patch_embd.weight{end}"), &[PATCH, PATCH, 3, WIDTH], TensorType::F16);
        }
        for block in (0..BLOCKS).map(|i| format!("v.blk.{i}")) {
            for norm in ["ln1", "ln2"] {
                self.constant(format!("{block}.{norm}.weight"), &[WIDTH], 1.0);
            }
            for matrix in ["attn_q", "attn_k", "attn_v", "attn_out"] {
                self.linear(&format!("{block}.{matrix}"), WIDTH, WIDTH);
            }
            self.linear(&format!("{block}.ffn_gate"), WIDTH, FEED_FORWARD);
            self.linear(&format!("{block}.ffn_up"), WIDTH, FEED_FORWARD);
            self.linear(&format!("{block}.ffn_down"), FEED_FORWARD, WIDTH);
        }
        self.constant("v.post_ln.weight".to_owned(), &[WIDTH], 1.0);
        self.linear("mm.0", 4 * WIDTH, 4 * WIDTH);
        self.linear("mm.2", 4 * WIDTH, n_embd);
    }

    fn audio(&mut self, n_embd: u32) {
        for (number, n_in) in [(1, MEL_BINS), (2, WIDTH)] {
            self.random(format!("a.conv1d.{number}.weight"), &[3, n_in, WIDTH], TensorType::F16);
            self.constant(format!("a.conv1d.{number}.bias"), &[1, WIDTH], 0.0);
        }
        self.random("a.position_embd.weight".to_owned(), &[WIDTH, POSITIONS], TensorType::F32);
        for block in (0..BLOCKS).map(|i| format!("a.blk.{i}")) {
            self.norm(&format!("{block}.ln1"));
            self.norm(&format!("{block}.ln2"));
            for matrix in ["attn_q", "attn_v", "attn_out"] {
                self.linear(&format!("{block}.{matrix}"), WIDTH, WIDTH);
            }
            // Whisper's keys have no bias; llama.cpp ends the process over one.
            self.random(format!("{block}.attn_k.weight"), &[WIDTH, WIDTH], TensorType::F16);
            self.linear(&format!("{block}.ffn_up"), WIDTH, FEED_FORWARD);
            self.linear(&format!("{block}.ffn_down"), FEED_FORWARD, WIDTH);
        }
        self.norm("a.post_ln");
        self.linear("mm.a.fc", WIDTH, n_embd);
    }

    fn linear(&mut self, name: &str, n_in: u32, n_out: u32) {
        self.random(format!("{name}.weight"), &[n_in, n_out], TensorType::F16);
        self.constant(format!("{name}.bias"), &[n_out], 0.0);
    }

    fn norm(&mut self, name: &str) {
        self.constant(format!("{name}.weight"), &[WIDTH], 1.0);
        self.constant(format!("{name}.bias"), &[WIDTH], 0.0);
    }

    fn constant(&mut self, name: String, shape: &[u32], value: f32) {
        self.writer.push(Tensor::new(name, wide(shape), TensorType::F32, move |_, out| out.fill(value)));
    }

    /// Numbers that keep about the root mean square of what they are multiplied with.
    fn random(&mut self, name: String, shape: &[u32], kind: TensorType) {
        let (seed, stream) = (self.seed, name.clone());
        let deviation = 1.0 / (shape[0] as f32).sqrt();
        self.writer.push(Tensor::new(name, wide(shape), kind, move |row, out| {
            Random::new(seed, &stream, row).add_noise(deviation, out);
        }));
    }
}

fn wide(shape: &[u32]) -> Vec<u64> {
    shape.iter().map(|n| u64::from(*n)).collect()
}

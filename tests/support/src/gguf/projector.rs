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
    vision: Tower,
    audio: Tower,
}

/// A tower's blocks, the width of its state and of its feed-forward networks, its heads.
#[derive(Clone, Copy, Debug)]
struct Tower {
    blocks: u32,
    width: u32,
    feed_forward: u32,
    heads: u32,
}

const TINY: Tower = Tower { blocks: 2, width: 64, feed_forward: 128, heads: 4 };
/// Qwen2.5-Omni-7B's, by its config.json.
const OMNI_VISION: Tower = Tower { blocks: 32, width: 1280, feed_forward: 3420, heads: 16 };
const OMNI_AUDIO: Tower = Tower { blocks: 32, width: 1280, feed_forward: 5120, heads: 20 };
/// Pixels of a patch's side, and frequencies of sound.
const PATCH: u32 = 14;
const MEL_BINS: u32 = 128;
/// Half a minute of sound, which llama.cpp always fills.
const POSITIONS: u32 = 1500;

impl Projector {
    /// A projector for a text model of this width.
    pub fn new(n_embd: u32) -> Self {
        Self { n_embd, seed: 0, vision: TINY, audio: TINY }
    }

    /// A projector as large as Qwen2.5-Omni-7B's, 2.6 GB, for a text model of this width.
    pub fn of_omni_7b(n_embd: u32) -> Self {
        Self { vision: OMNI_VISION, audio: OMNI_AUDIO, ..Self::new(n_embd) }
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
        let mut build = Build { writer: Writer::new(), seed: self.seed, tower: self.vision };
        let w = &mut build.writer;
        w.set("general.architecture", "clip");
        w.set("general.type", "mmproj");
        w.set("general.name", "synthetic projector");
        w.set("general.file_type", TensorType::F16.file_type());
        for (key, value) in [("use_silu", true), ("has_vision_encoder", true), ("has_audio_encoder", true)] {
            w.set(format!("clip.{key}"), value);
        }
        w.set("clip.projector_type", "qwen2.5o");
        for (tower, size, epsilon) in [("vision", self.vision, 1e-6_f32), ("audio", self.audio, 1e-5)] {
            let mut key = |name: &str, value: Value| w.set(format!("clip.{tower}.{name}"), value);
            key("block_count", size.blocks.into());
            key("embedding_length", size.width.into());
            key("feed_forward_length", size.feed_forward.into());
            key("projection_dim", self.n_embd.into());
            key("attention.head_count", size.heads.into());
            key("attention.layer_norm_epsilon", epsilon.into());
        }
        w.set("clip.vision.image_size", 560_u32);
        w.set("clip.vision.patch_size", PATCH);
        // Every eighth block of the real one attends to all; of two, the second.
        w.set("clip.vision.n_wa_pattern", self.vision.blocks.min(8));
        w.set("clip.vision.image_mean", vec![0.5_f32; 3]);
        w.set("clip.vision.image_std", vec![0.25_f32; 3]);
        w.set("clip.audio.num_mel_bins", MEL_BINS);
        build.vision(self.n_embd);
        build.tower = self.audio;
        build.audio(self.n_embd);
        build.writer
    }
}

struct Build {
    writer: Writer,
    seed: u64,
    /// The one that is being built.
    tower: Tower,
}

impl Build {
    fn vision(&mut self, n_embd: u32) {
        let Tower { blocks, width, feed_forward, .. } = self.tower;
        // The two pictures that a patch takes together.
        for end in ["", ".1"] {
            self.random(format!("v.patch_embd.weight{end}"), &[PATCH, PATCH, 3, width], TensorType::F16);
        }
        for block in (0..blocks).map(|i| format!("v.blk.{i}")) {
            for norm in ["ln1", "ln2"] {
                self.constant(format!("{block}.{norm}.weight"), &[width], 1.0);
            }
            for matrix in ["attn_q", "attn_k", "attn_v", "attn_out"] {
                self.linear(&format!("{block}.{matrix}"), width, width);
            }
            self.linear(&format!("{block}.ffn_gate"), width, feed_forward);
            self.linear(&format!("{block}.ffn_up"), width, feed_forward);
            self.linear(&format!("{block}.ffn_down"), feed_forward, width);
        }
        self.constant("v.post_ln.weight".to_owned(), &[width], 1.0);
        self.linear("mm.0", 4 * width, 4 * width);
        self.linear("mm.2", 4 * width, n_embd);
    }

    fn audio(&mut self, n_embd: u32) {
        let Tower { blocks, width, feed_forward, .. } = self.tower;
        for (number, n_in) in [(1, MEL_BINS), (2, width)] {
            self.random(format!("a.conv1d.{number}.weight"), &[3, n_in, width], TensorType::F16);
            self.constant(format!("a.conv1d.{number}.bias"), &[1, width], 0.0);
        }
        self.random("a.position_embd.weight".to_owned(), &[width, POSITIONS], TensorType::F32);
        for block in (0..blocks).map(|i| format!("a.blk.{i}")) {
            self.norm(&format!("{block}.ln1"));
            self.norm(&format!("{block}.ln2"));
            for matrix in ["attn_q", "attn_v", "attn_out"] {
                self.linear(&format!("{block}.{matrix}"), width, width);
            }
            // Whisper's keys have no bias; llama.cpp ends the process over one.
            self.random(format!("{block}.attn_k.weight"), &[width, width], TensorType::F16);
            self.linear(&format!("{block}.ffn_up"), width, feed_forward);
            self.linear(&format!("{block}.ffn_down"), feed_forward, width);
        }
        self.norm("a.post_ln");
        self.linear("mm.a.fc", width, n_embd);
    }

    fn linear(&mut self, name: &str, n_in: u32, n_out: u32) {
        self.random(format!("{name}.weight"), &[n_in, n_out], TensorType::F16);
        self.constant(format!("{name}.bias"), &[n_out], 0.0);
    }

    fn norm(&mut self, name: &str) {
        let width = self.tower.width;
        self.constant(format!("{name}.weight"), &[width], 1.0);
        self.constant(format!("{name}.bias"), &[width], 0.0);
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

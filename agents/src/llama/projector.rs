//! Checks a projector for images and audio before llama.cpp may see it: on most of what can be wrong with one, it ends the
//! process. The forms that were compared with llama.cpp's own graphs are checked tensor by tensor; of any other, only what
//! all of them have in common.

use std::path::Path;

use sarai_core::units::Bytes;

use super::header::{Header, TensorInfo, Value};
use crate::Error;

/// Rows of positions that the audio tower reads: half a minute, whatever the length of the sound.
const AUDIO_POSITIONS: u64 = 1500;
/// The highest `num_mel_bins` that llama.cpp takes.
const MOST_MEL_BINS: u64 = 256;
/// The largest picture, in pixels of a side.
const LARGEST_IMAGE: u64 = 8192;
/// Blocks of a tower; real ones have some tens.
const MOST_BLOCKS: u64 = 512;
/// `ggml_type`.
const F32: u32 = 0;
const F16: u32 = 1;

/// The most embeddings for one image, where a projector takes images of any size: a side of some 900 pixels for Qwen's. Its
/// own limit is 4,096, which a CPU reads for minutes.
pub(super) const MOST_IMAGE_TOKENS: u32 = 1024;
/// Frames of the spectrum of half a minute, which is what is heard at once.
const AUDIO_FRAMES: u128 = 3000;

/// What a projector can do, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Projection {
    pub(super) sees: bool,
    pub(super) hears: bool,
    /// Whether it takes images of any size, so that the largest has to be set.
    pub(super) any_size: bool,
    /// Numbers of an embedding.
    pub(super) width: usize,
    /// Its weights, which are always read into memory.
    pub(super) weights: Bytes,
    /// What its work takes besides, at most.
    pub(super) compute: Bytes,
}

impl Projection {
    /// All that it takes, with what is kept of its results for a context of `n_ctx`.
    pub(super) fn bytes(&self, n_ctx: u32) -> Bytes {
        let kept = n_ctx as usize / super::multimodal::KEPT_PART * self.width * size_of::<f32>();
        self.weights + self.compute + Bytes(kept as u64)
    }
}

/// Whether the file at `path` says that it sees and hears.
pub(super) fn towers(path: &Path) -> Result<(bool, bool), Error> {
    let header = Header::read(path)?;
    let has =
        |tower: Tower| header.value(&format!("clip.has_{}_encoder", tower.name)) == Some(&Value::Bool(true));
    Ok((has(Tower::VISION), has(Tower::AUDIO)))
}

/// Whether the file at `path` is a projector that can serve a text model with embeddings of `n_embd`.
pub(super) fn check_projector(path: &Path, n_embd: u64) -> Result<Projection, Error> {
    let header = Header::read(path)?;
    if !matches!(header.architecture(), "clip" | "mmproj") {
        return Err(
            header.bad("is not a projector for images or audio: its general.architecture is not clip")
        );
    }
    let towers = [("clip.has_vision_encoder", Tower::VISION), ("clip.has_audio_encoder", Tower::AUDIO)];
    let has = |key: &str| header.value(key) == Some(&Value::Bool(true));
    let towers: Vec<Tower> = towers.into_iter().filter(|(key, _)| has(key)).map(|(_, tower)| tower).collect();
    if towers.is_empty() {
        return Err(header.bad("has neither clip.has_vision_encoder nor clip.has_audio_encoder"));
    }
    let mut projection = Projection {
        sees: towers.contains(&Tower::VISION),
        hears: towers.contains(&Tower::AUDIO),
        any_size: false,
        width: usize::try_from(n_embd).unwrap_or(0),
        weights: Bytes(header.tensors.iter().map(|tensor| tensor.bytes).sum()),
        compute: Bytes::ZERO,
    };
    for tower in towers {
        let check = Check { header: &header, tower, n_embd };
        check.run()?;
        let (compute, any_size) = check.compute()?;
        // The two work one after another, each in buffers of its own.
        projection.compute += compute;
        projection.any_size |= any_size;
    }
    Ok(projection)
}

/// What is called how in a tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tower {
    /// In keys.
    name: &'static str,
    /// In tensors.
    prefix: &'static str,
}

impl Tower {
    const VISION: Self = Self { name: "vision", prefix: "v" };
    const AUDIO: Self = Self { name: "audio", prefix: "a" };
}

struct Check<'h> {
    header: &'h Header,
    tower: Tower,
    n_embd: u64,
}

/// A tower's sizes.
#[derive(Clone, Copy)]
struct Sizes {
    blocks: u64,
    width: u64,
    heads: u64,
    feed_forward: u64,
}

impl Check<'_> {
    fn run(&self) -> Result<(), Error> {
        let kind = self.kind()?;
        let sizes = self.sizes()?;
        match (kind, self.tower) {
            ("qwen2.5o" | "qwen2.5vl_merger" | "qwen2vl_merger", Tower::VISION) => {
                self.qwen_vision(kind, sizes)
            }
            ("qwen2.5o" | "qwen2a", Tower::AUDIO) => self.whisper(sizes),
            _ => self.blocks_are_there(sizes),
        }
    }

    /// What an encode of the largest image, or of half a minute, takes, and whether images may have any size: the intermediate
    /// results that are alive together, in F32, as the graphs of clip.cpp make them.
    fn compute(&self) -> Result<(Bytes, bool), Error> {
        let Sizes { width, feed_forward, .. } = self.sizes()?;
        let int = |name| u128::from(self.header.int(&self.key(name)).unwrap_or(0));
        let (width, feed_forward) = (u128::from(width), u128::from(feed_forward));
        let is_qwen = self.tower == Tower::VISION
            && matches!(self.kind()?, "qwen2.5o" | "qwen2.5vl_merger" | "qwen2vl_merger");
        let (patches, mask) = if self.tower == Tower::AUDIO {
            (AUDIO_FRAMES / 2, 0)
        } else if is_qwen {
            // Four patches become one embedding. Attention within windows has a mask of all patches, in F32 and F16.
            let patches = 4 * u128::from(MOST_IMAGE_TOKENS);
            (patches, patches * patches * 6)
        } else {
            let side = int("image_size") / int("patch_size").max(1);
            (side * side + 1, 0)
        };
        let bytes = patches * (4 * width + 3 * feed_forward) * size_of::<f32>() as u128 + mask;
        Ok((Bytes(u64::try_from(bytes).unwrap_or(u64::MAX)), is_qwen))
    }

    fn kind(&self) -> Result<&str, Error> {
        let own = self.key("projector_type");
        let kind = self.header.text("clip.projector_type").or_else(|| self.header.text(&own));
        kind.ok_or_else(|| self.bad("has no clip.projector_type"))
    }

    fn sizes(&self) -> Result<Sizes, Error> {
        let sizes = Sizes {
            blocks: self.number("block_count", MOST_BLOCKS)?,
            width: self.number("embedding_length", u32::MAX.into())?,
            heads: self.number("attention.head_count", u32::MAX.into())?,
            feed_forward: self.number("feed_forward_length", u32::MAX.into())?,
        };
        let Sizes { width, heads, .. } = sizes;
        if !width.is_multiple_of(heads) {
            let key = self.key("attention.head_count");
            return Err(
                self.bad(format!("has a {key} of {heads}, which does not divide its width of {width}"))
            );
        }
        // The graphs take what all these have to be for granted.
        for (name, wanted) in [("attention.head_count_kv", heads), ("attention.head_dim", width / heads)] {
            let key = self.key(name);
            if self.header.value(&key).is_some_and(|own| own.as_int() != Some(wanted)) {
                return Err(self.bad(format!("has a {key} other than {wanted}")));
            }
        }
        let epsilon = self.key("attention.layer_norm_epsilon");
        match self.header.value(&epsilon) {
            Some(Value::Float(number)) if number.is_finite() && *number >= 0.0 => Ok(sizes),
            _ => Err(self.bad(format!("has no usable {epsilon}"))),
        }
    }

    /// `clip_graph_qwen2vl`.
    fn qwen_vision(&self, kind: &str, sizes: Sizes) -> Result<(), Error> {
        let Sizes { blocks, width, heads, feed_forward } = sizes;
        if !(width / heads).is_multiple_of(4) {
            let key = self.key("attention.head_count");
            let head = width / heads;
            return Err(self.bad(format!("has a {key} that leaves heads of {head}, no multiple of 4")));
        }
        let patch = self.number("patch_size", LARGEST_IMAGE)?;
        self.number("image_size", LARGEST_IMAGE)?;
        if kind != "qwen2vl_merger" {
            self.number("n_wa_pattern", u32::MAX.into())?;
        }
        let merged = self.key("spatial_merge_size");
        if self.header.value(&merged).is_some_and(|merged| merged.as_int() != Some(2)) {
            return Err(self.bad(format!("has a {merged} other than 2")));
        }
        for name in ["v.patch_embd.bias", "v.class_embd"] {
            self.is_absent(name)?;
        }
        for name in ["v.patch_embd.weight", "v.patch_embd.weight.1"] {
            self.tensor(name, &[patch, patch, 3, width], &[F32, F16])?;
        }
        for block in (0..blocks).map(|block| format!("v.blk.{block}")) {
            for norm in ["ln1", "ln2"] {
                self.norm(&format!("{block}.{norm}"), width)?;
            }
            for matrix in ["attn_q", "attn_k", "attn_v"] {
                self.linear(&format!("{block}.{matrix}"), width, width)?;
            }
            self.matrix(&format!("{block}.attn_out"), width, width)?;
            self.feed_forward(&block, width, feed_forward)?;
        }
        for norm in ["v.pre_ln", "v.post_ln"] {
            self.may_be_norm(norm, width)?;
        }
        // Four patches that lie together become one embedding.
        let inner = self.rows("mm.0.weight")?;
        self.linear("mm.0", 4 * width, inner)?;
        self.projects("mm.2", inner)
    }

    /// `clip_graph_whisper_enc`.
    fn whisper(&self, sizes: Sizes) -> Result<(), Error> {
        let Sizes { blocks, width, feed_forward, .. } = sizes;
        let mel_bins = self.number("num_mel_bins", MOST_MEL_BINS)?;
        for (number, n_in) in [(1, mel_bins), (2, width)] {
            self.tensor(&format!("a.conv1d.{number}.weight"), &[3, n_in, width], &[F16])?;
            self.tensor(&format!("a.conv1d.{number}.bias"), &[1, width], &[F32])?;
        }
        let positions = "a.position_embd.weight";
        let rows = self.rows(positions)?;
        if rows < AUDIO_POSITIONS {
            return Err(self.bad(format!("has {rows} rows in {positions}; {AUDIO_POSITIONS} are the least")));
        }
        self.tensor(positions, &[width, rows], &[F32])?;
        for block in (0..blocks).map(|block| format!("a.blk.{block}")) {
            for norm in ["ln1", "ln2"] {
                self.norm(&format!("{block}.{norm}"), width)?;
                self.vector(&format!("{block}.{norm}.bias"), width)?;
            }
            for matrix in ["attn_q", "attn_v"] {
                self.linear(&format!("{block}.{matrix}"), width, width)?;
            }
            self.tensor(&format!("{block}.attn_k.weight"), &[width, width], &[])?;
            self.is_absent(&format!("{block}.attn_k.bias"))?;
            self.matrix(&format!("{block}.attn_out"), width, width)?;
            self.feed_forward(&block, width, feed_forward)?;
        }
        self.may_be_norm("a.post_ln", width)?;
        self.projects("mm.a.fc", width)
    }

    fn blocks_are_there(&self, sizes: Sizes) -> Result<(), Error> {
        let begins = |block| format!("{}.blk.{block}.", self.tower.prefix);
        let has =
            |block: &u64| self.header.tensors.iter().any(|tensor| tensor.name.starts_with(&begins(*block)));
        match (0..sizes.blocks).find(|block| !has(block)) {
            // Some forms have no blocks of this name at all.
            Some(missing) if missing > 0 => Err(self.bad(format!(
                "has a {} of {}, but no tensors of {}",
                self.key("block_count"),
                sizes.blocks,
                begins(missing)
            ))),
            Some(_) | None => Ok(()),
        }
    }

    fn feed_forward(&self, block: &str, width: u64, inner: u64) -> Result<(), Error> {
        let (up, down) = (format!("{block}.ffn_up"), format!("{block}.ffn_down"));
        // Older files of the vision towers have the two under each other's names, which llama.cpp knows.
        let is_swapped = self.tower == Tower::VISION
            && self.found(&format!("{down}.weight"))?.shape.first() == Some(&width);
        let (up, down) = if is_swapped { (down, up) } else { (up, down) };
        self.matrix(&up, width, inner)?;
        if self.header.tensor(&format!("{block}.ffn_gate.weight")).is_some() {
            self.matrix(&format!("{block}.ffn_gate"), width, inner)?;
        }
        self.matrix(&down, inner, width)
    }

    /// The last step, whose results stand beside the text's embeddings.
    fn projects(&self, name: &str, n_in: u64) -> Result<(), Error> {
        let (key, wanted) = (self.key("projection_dim"), self.number("projection_dim", u32::MAX.into())?);
        if wanted != self.n_embd {
            return Err(
                self.bad(format!("has a {key} of {wanted}, but the model's embeddings have {}", self.n_embd))
            );
        }
        self.linear(name, n_in, wanted)
    }

    /// A matrix and its bias.
    fn linear(&self, name: &str, n_in: u64, n_out: u64) -> Result<(), Error> {
        self.tensor(&format!("{name}.weight"), &[n_in, n_out], &[])?;
        self.vector(&format!("{name}.bias"), n_out)
    }

    /// A matrix that may have a bias.
    fn matrix(&self, name: &str, n_in: u64, n_out: u64) -> Result<(), Error> {
        self.tensor(&format!("{name}.weight"), &[n_in, n_out], &[])?;
        let bias = format!("{name}.bias");
        if self.header.tensor(&bias).is_some() { self.vector(&bias, n_out) } else { Ok(()) }
    }

    fn may_be_norm(&self, name: &str, width: u64) -> Result<(), Error> {
        if self.header.tensor(&format!("{name}.weight")).is_some() { self.norm(name, width) } else { Ok(()) }
    }

    fn norm(&self, name: &str, width: u64) -> Result<(), Error> {
        self.vector(&format!("{name}.weight"), width)?;
        let bias = format!("{name}.bias");
        if self.header.tensor(&bias).is_some() { self.vector(&bias, width) } else { Ok(()) }
    }

    fn vector(&self, name: &str, length: u64) -> Result<(), Error> {
        self.tensor(name, &[length], &[F32])
    }

    /// A tensor of this shape, and of one of these types; of any that llama.cpp multiplies with where none is named.
    fn tensor(&self, name: &str, shape: &[u64], kinds: &[u32]) -> Result<(), Error> {
        let found = self.found(name)?;
        // Dimensions of 1 at the end may be left out.
        let trimmed = |shape: &[u64]| {
            let length = shape.iter().rposition(|n| *n != 1).map_or(0, |last| last + 1);
            shape[..length].to_vec()
        };
        if trimmed(&found.shape) != trimmed(shape) {
            let TensorInfo { shape: found, .. } = found;
            return Err(self.bad(format!("has a {name} of the shape {found:?}, where {shape:?} is needed")));
        }
        if super::check::INTEGERS.contains(&found.kind) || !kinds.is_empty() && !kinds.contains(&found.kind) {
            return Err(self.bad(format!("has a {name} of the unsuitable type {}", found.kind)));
        }
        Ok(())
    }

    /// Rows of a matrix that is there.
    fn rows(&self, name: &str) -> Result<u64, Error> {
        Ok(self.found(name)?.shape.get(1).copied().unwrap_or(1))
    }

    fn found(&self, name: &str) -> Result<&TensorInfo, Error> {
        self.header.tensor(name).ok_or_else(|| self.bad(format!("has no tensor {name}")))
    }

    fn is_absent(&self, name: &str) -> Result<(), Error> {
        match self.header.tensor(name) {
            Some(_) => Err(self.bad(format!("has a tensor {name}, which its form does not have"))),
            None => Ok(()),
        }
    }

    /// A number of the tower, from 1 to `most`.
    fn number(&self, name: &str, most: u64) -> Result<u64, Error> {
        let key = self.key(name);
        let number = self.header.int(&key).filter(|number| (1..=most).contains(number));
        number.ok_or_else(|| self.bad(format!("has no usable {key}")))
    }

    fn key(&self, name: &str) -> String {
        format!("clip.{}.{name}", self.tower.name)
    }

    fn bad(&self, reason: impl Into<String>) -> Error {
        self.header.bad(reason)
    }
}

#[cfg(test)]
mod tests {
    use sarai_support::gguf::{Damage, Kind, Model, Projector};

    use super::*;

    const N_EMBD: u32 = 192;

    fn checked(bytes: &[u8]) -> Result<Projection, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mmproj.gguf");
        std::fs::write(&path, bytes).unwrap();
        check_projector(&path, N_EMBD.into())
    }

    fn refusal(damage: &Damage) -> String {
        checked(&Projector::new(N_EMBD).damaged(damage).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn a_projector_in_order_passes_for_its_model_and_for_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mmproj.gguf");
        Projector::new(N_EMBD).write_to(&path).unwrap();
        check_projector(&path, N_EMBD.into()).unwrap();
        let other = check_projector(&path, 256).unwrap_err().to_string();
        assert!(
            other.contains("clip.vision.projection_dim of 192, but the model's embeddings have 256"),
            "{other}"
        );
    }

    #[test]
    fn what_would_end_the_process_is_refused_by_the_name_of_key_or_tensor() {
        let missing = |name: &str| Damage::MissingTensor(name.to_owned());
        let shape = |name: &str, shape: &[u64]| Damage::Shape(name.to_owned(), shape.to_vec());
        let number = |key: &str, number| Damage::Number(key.to_owned(), number);
        for (damage, said) in [
            (shape("a.position_embd.weight", &[64, 1499]), "1499 rows in a.position_embd.weight; 1500 are"),
            (
                shape("a.blk.0.attn_k.bias", &[64]),
                "a tensor a.blk.0.attn_k.bias, which its form does not have",
            ),
            (missing("a.blk.0.attn_q.bias"), "no tensor a.blk.0.attn_q.bias"),
            (missing("a.blk.1.attn_v.bias"), "no tensor a.blk.1.attn_v.bias"),
            (missing("a.blk.1.ln2.bias"), "no tensor a.blk.1.ln2.bias"),
            (missing("mm.a.fc.bias"), "no tensor mm.a.fc.bias"),
            (number("clip.vision.projection_dim", 128), "clip.vision.projection_dim of 128"),
            (number("clip.audio.projection_dim", 128), "clip.audio.projection_dim of 128"),
            (shape("v.blk.1.attn_out.weight", &[64, 32]), "a v.blk.1.attn_out.weight of the shape [64, 32]"),
            (shape("v.patch_embd.weight.1", &[14, 14, 1, 64]), "a v.patch_embd.weight.1 of the shape"),
            (shape("mm.0.weight", &[64, 256]), "a mm.0.weight of the shape [64, 256], where [256, 256] is"),
            (missing("v.blk.0.attn_q.weight"), "no tensor v.blk.0.attn_q.weight"),
            (missing("v.blk.1.attn_k.bias"), "no tensor v.blk.1.attn_k.bias"),
            (missing("v.patch_embd.weight"), "no tensor v.patch_embd.weight"),
            (shape("v.class_embd", &[64]), "a tensor v.class_embd, which its form does not have"),
            (number("clip.vision.attention.head_count", 0), "no usable clip.vision.attention.head_count"),
            (
                number("clip.vision.attention.head_count", 5),
                "clip.vision.attention.head_count of 5, which does not",
            ),
            (number("clip.vision.attention.head_count", 32), "leaves heads of 2, no multiple of 4"),
            (
                number("clip.audio.attention.head_count_kv", 2),
                "clip.audio.attention.head_count_kv other than 4",
            ),
            (number("clip.audio.block_count", 3), "no tensor a.blk.2.ln1.weight"),
            (number("clip.audio.num_mel_bins", 1000), "no usable clip.audio.num_mel_bins"),
            (number("clip.vision.patch_size", 0), "no usable clip.vision.patch_size"),
            (Damage::MissingKey("clip.vision.n_wa_pattern".to_owned()), "no usable clip.vision.n_wa_pattern"),
            (Damage::MissingKey("clip.projector_type".to_owned()), "no clip.projector_type"),
            (Damage::Truncated(5000), "truncated"),
        ] {
            let refused = refusal(&damage);
            assert!(refused.contains(said), "{damage:?}: {refused}");
        }
    }

    #[test]
    fn what_is_no_projector_is_refused() {
        let model = checked(&Model::new(Kind::Llama).to_bytes().unwrap()).unwrap_err().to_string();
        assert!(model.contains("is not a projector"), "{model}");
        let mut towerless = Projector::new(N_EMBD).writer();
        towerless.set("clip.has_vision_encoder", false);
        towerless.set("clip.has_audio_encoder", false);
        let towerless = checked(&towerless.to_bytes().unwrap()).unwrap_err().to_string();
        assert!(towerless.contains("clip.has_vision_encoder"), "{towerless}");
    }

    #[test]
    fn a_form_that_was_never_compared_is_checked_for_what_all_have_in_common() {
        let mut other = Projector::new(N_EMBD).writer();
        other.set("clip.projector_type", "gemma3");
        other.remove_tensor("v.blk.0.attn_q.weight");
        checked(&other.to_bytes().unwrap()).unwrap();
        other.set("clip.vision.block_count", 9_u32);
        let refused = checked(&other.to_bytes().unwrap()).unwrap_err().to_string();
        assert!(refused.contains("a clip.vision.block_count of 9, but no tensors of v.blk.2."), "{refused}");
    }

    proptest::proptest! {
        #[test]
        fn changed_bytes_never_make_it_panic(changes in proptest::collection::vec((0..9000_usize, 0..=255_u8), 1..8)) {
            let mut bytes = Projector::new(N_EMBD).writer().to_bytes().unwrap();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            // Whether it is still in order depends on the byte.
            let _either = checked(&bytes);
        }
    }
}

//! The text models.

use std::sync::Arc;

use super::error::Error;
use super::model::{Build, Model};
use super::random::Random;
use super::script::Script;
use super::tensor::{Tensor, TensorType};
use super::vocab::Vocab;
use super::writer::Writer;

pub(crate) const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
    + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

pub(crate) fn llama(model: &Model) -> Result<Writer, Error> {
    let mut build = attention_only(model, "llama")?;
    build.key("rope.dimension_count", model.head_size());
    build.key("rope.freq_base", 10_000.0_f32);
    Ok(build.writer)
}

pub(crate) fn qwen2vl(model: &Model) -> Result<Writer, Error> {
    let mut build = attention_only(model, "qwen2vl")?;
    let pairs = model.head_size() / 2;
    // A part for the time, and two for the place in a picture.
    let time = pairs / 4;
    let place = (pairs - time) / 2;
    build.key("rope.dimension_sections", [pairs - 2 * place, place, place, 0].map(u32::cast_signed).to_vec());
    build.key("rope.freq_base", 1_000_000.0_f32);
    Ok(build.writer)
}

/// Attention in every block.
fn attention_only<'a>(model: &'a Model, arch: &'static str) -> Result<Build<'a>, Error> {
    let mut vocab = vocabulary(model, "llama-bpe", false);
    let mut build = Build::new(model, arch, &mut vocab)?;
    build.writer.set("tokenizer.chat_template", CHATML);
    build.key("vocab_size", vocab.len() as u32);
    build.key("attention.head_count_kv", model.n_head_kv);
    build.key("attention.layer_norm_rms_epsilon", 1e-5_f32);
    speech(&mut build, model, &vocab, "output_norm.weight");
    for i in 0..model.n_layer {
        let block = format!("blk.{i}");
        build.constant(&format!("{block}.attn_norm.weight"), model.n_embd, 1.0);
        build.attention(&block, CONTEXT * gain(model));
        build.constant(&format!("{block}.ffn_norm.weight"), model.n_embd, 1.0);
        build.gated(&block, gain(model));
    }
    Ok(build)
}

fn vocabulary(model: &Model, pre: &'static str, add_bos: bool) -> Vocab {
    let mut vocab = Vocab::byte_level(pre, add_bos);
    model.says.iter().for_each(|text| vocab.add_text(text));
    vocab
}

pub(crate) fn lfm2(model: &Model) -> Result<Writer, Error> {
    /// Tokens that a convolution sees; those before the current one are its state.
    const KERNEL: u32 = 3;

    let has_attention = |i: u32| i % 2 == 1;
    let mut vocab = vocabulary(model, "lfm2", true);
    let mut build = Build::new(model, "lfm2", &mut vocab)?;
    build.writer.set("tokenizer.chat_template", format!("{{{{ bos_token }}}}{CHATML}"));
    build.key("vocab_size", vocab.len() as u32);
    // Zero marks a convolution block.
    let heads = (0..model.n_layer).map(|i| if has_attention(i) { model.n_head_kv } else { 0 });
    build.key("attention.head_count_kv", heads.collect::<Vec<_>>());
    build.key("attention.layer_norm_rms_epsilon", 1e-5_f32);
    build.key("rope.freq_base", 1_000_000.0_f32);
    build.key("shortconv.l_cache", KERNEL);
    speech(&mut build, model, &vocab, "token_embd_norm.weight");
    for i in 0..model.n_layer {
        let block = format!("blk.{i}");
        build.constant(&format!("{block}.attn_norm.weight"), model.n_embd, 1.0);
        if has_attention(i) {
            build.attention(&block, CONTEXT * gain(model));
            build.constant(&format!("{block}.attn_q_norm.weight"), model.head_size(), 1.0);
            build.constant(&format!("{block}.attn_k_norm.weight"), model.head_size(), 1.0);
        } else {
            let n = model.n_embd;
            build.matrix(&format!("{block}.shortconv.in_proj"), n, 3 * n, 1.0);
            build.matrix(&format!("{block}.shortconv.out_proj"), n, n, gain(model));
            let (name, seed) = (format!("{block}.shortconv.conv.weight"), model.seed);
            let shape = [u64::from(KERNEL), u64::from(n)];
            let stream = name.clone();
            build.writer.push(Tensor::new(name, shape, TensorType::F32, move |row, out| {
                Random::new(seed, &stream, row).add_noise(0.6, out);
            }));
        }
        build.constant(&format!("{block}.ffn_norm.weight"), model.n_embd, 1.0);
        build.gated(&block, gain(model));
    }
    Ok(build.writer)
}

/// The embedding, the last norm and the output matrix, which together follow the script.
///
/// A token's embedding is its place's direction, one that all tokens share, and a random part of its own. The blocks
/// add their share, and the output matrix looks in what comes out for the direction of the place before. With these
/// figures the next place's tokens get logits of about 18 ± 2, those of other places 0 ± 3, and all other tokens -10.
fn speech(build: &mut Build<'_>, model: &Model, vocab: &Vocab, norm: &str) {
    const PLACE: f32 = 0.8;
    const SHARED: f32 = 0.3;
    const OWN: f32 = 0.6;
    const FOLLOW: f32 = 28.0;
    const CHOICE: f32 = 2.0;
    const MUTE: f32 = -40.0;

    let (seed, n_embd) = (model.seed, model.n_embd as f32);
    let script = match model.says.as_slice() {
        [] => Script::new(seed, model.endless, vocab),
        texts => Script::saying(texts, vocab),
    };
    let script = Arc::new(script);
    let directions = Arc::new(Directions::new(seed, model.n_embd));
    let (said, looked_for) = (Arc::clone(&script), Arc::clone(&directions));
    build.rows("token_embd.weight", vocab.len(), move |id, row| {
        directions.add(script.place[id as usize], PLACE, row);
        directions.add_shared(SHARED, row);
        Random::new(seed, "token_embd.weight", id).add_noise(OWN, row);
    });
    build.constant(norm, model.n_embd, 1.0);
    build.rows("output.weight", vocab.len(), move |id, row| {
        let follows = &said.follows[id as usize];
        for place in follows {
            looked_for.add(*place, FOLLOW / n_embd, row);
        }
        if follows.is_empty() {
            looked_for.add_shared(MUTE / n_embd, row);
        } else {
            Random::new(seed, "output.weight", id).add_noise(CHOICE / n_embd.sqrt(), row);
        }
    });
}

/// Orthogonal directions: the Walsh functions of length [`Directions::MOST`], repeated, with random signs.
struct Directions(Vec<f32>);

impl Directions {
    /// The width of the state has to be a multiple of this.
    const MOST: u32 = super::model::WIDTH_STEP;

    fn new(seed: u64, n_embd: u32) -> Self {
        let mut signs = vec![0.0; n_embd as usize];
        Random::new(seed, "directions", 0).add_signs(1.0, &mut signs);
        Self(signs)
    }

    fn add(&self, place: u32, scale: f32, row: &mut [f32]) {
        // The first function is the shared one's.
        self.add_walsh(place + 1, scale, row);
    }

    fn add_shared(&self, scale: f32, row: &mut [f32]) {
        self.add_walsh(0, scale, row);
    }

    fn add_walsh(&self, function: u32, scale: f32, row: &mut [f32]) {
        debug_assert!(function < Self::MOST, "more places than directions");
        for ((x, sign), i) in row.iter_mut().zip(&self.0).zip(0_u32..) {
            let odd = (i & function).count_ones() & 1 == 1;
            *x += if odd { -scale * sign } else { scale * sign };
        }
    }
}

/// How much more attention counts than the other branches: it averages over the text, which leaves little, and what it
/// leaves decides whether another prompt is answered otherwise.
const CONTEXT: f32 = 2.0;

/// What a block's two branches add, so that all blocks together weigh less than the embedding.
fn gain(model: &Model) -> f32 {
    0.7 / (model.n_layer as f32).sqrt()
}

//! The gemma-embedding model.

use super::bert::{EPSILON, MEAN, NORM, importances};
use super::error::Error;
use super::model::{Build, Model};
use super::random::Random;
use super::vocab::Vocab;
use super::writer::Writer;

pub(crate) fn embedding(model: &Model) -> Result<Writer, Error> {
    let mut vocab = Vocab::sentence_piece();
    let mut build = Build::new(model, "gemma-embedding", &mut vocab)?;
    build.key("attention.head_count_kv", model.n_head_kv);
    build.key("attention.key_length", model.head_size());
    build.key("attention.value_length", model.head_size());
    build.key("attention.layer_norm_rms_epsilon", EPSILON);
    build.key("attention.sliding_window", 512_u32);
    // Every second block sees all. llama.cpp ends the process over a model in which none does, as would be the case
    // with less than six blocks and its usual pattern.
    build.key("attention.sliding_window_pattern", 2_u32);
    build.key("rope.freq_base", 1_000_000.0_f32);
    build.key("pooling_type", MEAN);

    let (seed, weights) = (model.seed, importances(&vocab));
    // llama.cpp multiplies the embedding by this root.
    let scale = 1.0 / (model.n_embd as f32).sqrt();
    build.rows("token_embd.weight", vocab.len(), move |id, row| {
        Random::new(seed, "token_embd.weight", id).add_noise(weights[id as usize] * scale, row);
    });
    build.constant("output_norm.weight", model.n_embd, NORM);
    let gain = 0.2 / (model.n_layer as f32).sqrt();
    for i in 0..model.n_layer {
        let block = format!("blk.{i}");
        build.constant(&format!("{block}.attn_norm.weight"), model.n_embd, NORM);
        build.attention(&block, gain);
        build.constant(&format!("{block}.attn_q_norm.weight"), model.head_size(), NORM);
        build.constant(&format!("{block}.attn_k_norm.weight"), model.head_size(), NORM);
        for norm in ["post_attention_norm", "ffn_norm", "post_ffw_norm"] {
            build.constant(&format!("{block}.{norm}.weight"), model.n_embd, NORM);
        }
        build.gated(&block, gain);
    }
    if model.dense {
        let (n_embd, between) = (model.n_embd, 2 * model.n_embd);
        for (key, width) in [
            ("dense_2_feat_in", n_embd),
            ("dense_2_feat_out", between),
            ("dense_3_feat_in", between),
            ("dense_3_feat_out", n_embd),
        ] {
            build.key(key, width);
        }
        build.matrix("dense_2", n_embd, between, 1.0);
        build.matrix("dense_3", between, n_embd, 1.0);
    }
    Ok(build.writer)
}

//! The embedding model.

use super::super::bert::MEAN;
use super::super::vocab::Vocab;
use super::super::writer::Writer;
use super::Shape;
use super::body::{Body, Dimensions};
use super::mix::Mix;

pub(super) fn gemma() -> Writer {
    /// The width between the two dense modules that follow the pooling.
    const DENSE: u32 = 3072;

    let mut vocab = Vocab::sentence_piece();
    vocab.fill_up(262_144);
    let dimensions = Dimensions {
        n_layer: 24,
        n_embd: 768,
        n_ff: 1152,
        n_head: 3,
        n_head_kv: 1,
        n_ctx: 2048,
        rope_freq_base: 1_000_000.0,
    };
    let Dimensions { n_layer, n_embd, n_head_kv, .. } = dimensions;
    let mut body = Body::new(Shape::EmbeddingGemma, "gemma-embedding", Mix::Q8_0, dimensions, &vocab);
    body.key("attention.head_count_kv", n_head_kv);
    body.key("attention.key_length", dimensions.head_size());
    body.key("attention.value_length", dimensions.head_size());
    body.key("attention.layer_norm_rms_epsilon", 1e-6_f32);
    body.key("attention.sliding_window", 512_u32);
    body.key("pooling_type", MEAN);
    body.key("dense_2_feat_in", n_embd);
    body.key("dense_2_feat_out", DENSE);
    body.key("dense_3_feat_in", DENSE);
    body.key("dense_3_feat_out", n_embd);
    body.embedding(&vocab, false, 0);
    body.norm("output_norm", n_embd);
    for i in 0..n_layer {
        let block = format!("blk.{i}");
        body.norm(&format!("{block}.attn_norm"), n_embd);
        body.attention(&block, i, n_layer);
        body.norm(&format!("{block}.attn_q_norm"), dimensions.head_size());
        body.norm(&format!("{block}.attn_k_norm"), dimensions.head_size());
        for norm in ["post_attention_norm", "ffn_norm", "post_ffw_norm"] {
            body.norm(&format!("{block}.{norm}"), n_embd);
        }
        body.gated(&block, i);
    }
    body.matrix("dense_2", n_embd, DENSE);
    body.matrix("dense_3", DENSE, n_embd);
    body.writer
}

//! The text models.

use super::super::decoder::CHATML;
use super::super::tensor::{Tensor, TensorType};
use super::super::vocab::Vocab;
use super::super::writer::Writer;
use super::Shape;
use super::body::{Body, Dimensions};
use super::mix::Mix;

pub(super) fn solar() -> Writer {
    let vocab = words(Vocab::byte_level("llama-bpe", false), 32_000);
    let dimensions = Dimensions {
        n_layer: 48,
        n_embd: 4096,
        n_ff: 14_336,
        n_head: 32,
        n_head_kv: 8,
        n_ctx: 4096,
        rope_freq_base: 10_000.0,
    };
    let mut body = Body::new(Shape::Solar, "llama", Mix::Q4_K_M, dimensions, &vocab);
    body.embedding(&vocab, false, 0);
    body.output(&vocab);
    llama(body, dimensions, &vocab)
}

pub(super) fn llama_1b() -> Writer {
    let vocab = words(Vocab::byte_level("llama-bpe", false), 128_256);
    let dimensions = Dimensions {
        n_layer: 16,
        n_embd: 2048,
        n_ff: 8192,
        n_head: 32,
        n_head_kv: 8,
        n_ctx: 131_072,
        rope_freq_base: 500_000.0,
    };
    let mut body = Body::new(Shape::Llama1b, "llama", Mix::Q4_0, dimensions, &vocab);
    body.embedding(&vocab, true, vocab.wordless() as u64);
    body.norm("rope_freqs", dimensions.head_size() / 2);
    llama(body, dimensions, &vocab)
}

pub(super) fn omni_7b() -> Writer {
    let vocab = words(Vocab::byte_level("qwen2", false), 152_064);
    let dimensions = Dimensions {
        n_layer: 28,
        n_embd: 3584,
        n_ff: 18_944,
        n_head: 28,
        n_head_kv: 4,
        n_ctx: 32_768,
        rope_freq_base: 1_000_000.0,
    };
    let Dimensions { n_layer, n_embd, n_head_kv, .. } = dimensions;
    let mut body = Body::new(Shape::Omni7b, "qwen2vl", Mix::Q4_K_M, dimensions, &vocab);
    body.writer.set("tokenizer.chat_template", CHATML);
    body.key("attention.head_count_kv", n_head_kv);
    body.key("attention.layer_norm_rms_epsilon", 1e-6_f32);
    // Of time, height and width; for text, the three positions are the same.
    body.key("rope.dimension_sections", vec![16_i32, 24, 24, 0]);
    body.embedding(&vocab, false, 0);
    body.output(&vocab);
    body.norm("output_norm", n_embd);
    for i in 0..n_layer {
        let block = format!("blk.{i}");
        body.norm(&format!("{block}.attn_norm"), n_embd);
        body.attention(&block, i, n_layer);
        for (name, n) in [
            ("q", n_embd),
            ("k", dimensions.head_size() * n_head_kv),
            ("v", dimensions.head_size() * n_head_kv),
        ] {
            body.bias(&format!("{block}.attn_{name}"), n);
        }
        body.norm(&format!("{block}.ffn_norm"), n_embd);
        body.gated(&block, i);
    }
    body.writer
}

fn llama(mut body: Body, dimensions: Dimensions, vocab: &Vocab) -> Writer {
    let Dimensions { n_layer, n_embd, n_head_kv, .. } = dimensions;
    body.writer.set("tokenizer.chat_template", CHATML);
    body.key("vocab_size", vocab.len() as u32);
    body.key("attention.head_count_kv", n_head_kv);
    body.key("attention.layer_norm_rms_epsilon", 1e-5_f32);
    body.key("rope.dimension_count", dimensions.head_size());
    body.norm("output_norm", n_embd);
    for i in 0..n_layer {
        let block = format!("blk.{i}");
        body.norm(&format!("{block}.attn_norm"), n_embd);
        body.attention(&block, i, n_layer);
        body.norm(&format!("{block}.ffn_norm"), n_embd);
        body.gated(&block, i);
    }
    body.writer
}

pub(super) fn lfm2() -> Writer {
    /// The blocks with attention; the others have a convolution.
    const ATTENTION: [u32; 6] = [2, 5, 8, 10, 12, 14];
    /// Tokens that a convolution sees.
    const KERNEL: u32 = 3;

    let vocab = words(Vocab::byte_level("lfm2", true), 65_536);
    let dimensions = Dimensions {
        n_layer: 16,
        n_embd: 2048,
        n_ff: 8192,
        n_head: 32,
        n_head_kv: 8,
        n_ctx: 128_000,
        rope_freq_base: 1_000_000.0,
    };
    let Dimensions { n_layer, n_embd, n_head_kv, .. } = dimensions;
    let mut body = Body::new(Shape::Lfm2, "lfm2", Mix::Q4_K_M, dimensions, &vocab);
    body.writer.set("tokenizer.chat_template", format!("{{{{ bos_token }}}}{CHATML}"));
    body.key("vocab_size", vocab.len() as u32);
    // Zero marks a convolution block.
    let heads = (0..n_layer).map(|i| if ATTENTION.contains(&i) { n_head_kv } else { 0 });
    body.key("attention.head_count_kv", heads.collect::<Vec<_>>());
    body.key("attention.layer_norm_rms_epsilon", 1e-5_f32);
    body.key("shortconv.l_cache", KERNEL);
    body.embedding(&vocab, true, vocab.wordless() as u64);
    body.norm("token_embd_norm", n_embd);
    for i in 0..n_layer {
        let block = format!("blk.{i}");
        body.norm(&format!("{block}.attn_norm"), n_embd);
        if let Some(nth) = ATTENTION.iter().position(|block| *block == i) {
            body.attention(&block, nth as u32, ATTENTION.len() as u32);
            body.norm(&format!("{block}.attn_q_norm"), dimensions.head_size());
            body.norm(&format!("{block}.attn_k_norm"), dimensions.head_size());
        } else {
            let conv = format!("{block}.shortconv.conv.weight");
            let shape = [u64::from(KERNEL), u64::from(n_embd)];
            body.writer.push(Tensor::random(conv, shape, TensorType::F32, 0.6, 0));
            body.matrix(&format!("{block}.shortconv.in_proj"), n_embd, 3 * n_embd);
            body.matrix(&format!("{block}.shortconv.out_proj"), n_embd, n_embd);
        }
        body.norm(&format!("{block}.ffn_norm"), n_embd);
        body.gated(&block, i);
    }
    body.writer
}

fn words(mut vocab: Vocab, n: usize) -> Vocab {
    vocab.fill_with_words(n);
    vocab
}

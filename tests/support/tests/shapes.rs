//! The shapes as large as real models: what is in them, without writing them.

use sarai_support::gguf::{Array, Shape, TensorType, Value};

#[test]
fn the_tensors_take_as_many_bytes_as_the_shapes_and_types_say() {
    // Added up by hand: rows × blocks per row × bytes per block, over all tensors.
    for (shape, bytes) in [
        (Shape::Lfm2, 728_509_440),
        (Shape::Solar, 6_460_923_904),
        (Shape::Llama1b, 763_097_216),
        (Shape::Omni7b, 4_677_120_000),
        (Shape::EmbeddingGemma, 327_060_480),
    ] {
        assert_eq!(shape.writer().tensor_bytes().unwrap(), bytes, "{}", shape.name());
    }
}

#[test]
fn the_types_are_mixed_as_llama_quantize_does_it() {
    use TensorType::{F32, Q4_0, Q4_K, Q6_K, Q8_0};
    for (shape, name, dimensions, kind) in [
        (Shape::Lfm2, "token_embd.weight", &[2048, 65_536][..], Q6_K),
        (Shape::Lfm2, "blk.0.shortconv.in_proj.weight", &[2048, 6144], Q4_K),
        (Shape::Lfm2, "blk.0.shortconv.conv.weight", &[3, 2048], F32),
        (Shape::Lfm2, "blk.2.attn_k.weight", &[2048, 512], Q4_K),
        // The third of six attentions is one of those that get more bits, and so is the last block.
        (Shape::Lfm2, "blk.8.attn_v.weight", &[2048, 512], Q6_K),
        (Shape::Lfm2, "blk.15.ffn_down.weight", &[8192, 2048], Q6_K),
        (Shape::Lfm2, "blk.12.ffn_down.weight", &[8192, 2048], Q4_K),
        (Shape::Solar, "token_embd.weight", &[4096, 32_000], Q4_K),
        (Shape::Solar, "output.weight", &[4096, 32_000], Q6_K),
        (Shape::Solar, "blk.47.ffn_down.weight", &[14_336, 4096], Q6_K),
        (Shape::Solar, "blk.6.attn_v.weight", &[4096, 1024], Q4_K),
        (Shape::Llama1b, "token_embd.weight", &[2048, 128_256], Q6_K),
        (Shape::Llama1b, "blk.15.ffn_down.weight", &[8192, 2048], Q4_0),
        (Shape::EmbeddingGemma, "blk.23.attn_k.weight", &[768, 256], Q8_0),
        (Shape::EmbeddingGemma, "dense_2.weight", &[768, 3072], Q8_0),
    ] {
        let file = shape.writer();
        let tensor = file.tensor(name).unwrap();
        assert_eq!((tensor.shape(), tensor.kind()), (dimensions, kind), "{} {name}", shape.name());
    }
}

#[test]
fn the_vocabularies_are_full_and_a_tied_output_has_no_matrix() {
    for (shape, n_vocab, tied) in [
        (Shape::Lfm2, 65_536, true),
        (Shape::Solar, 32_000, false),
        (Shape::Llama1b, 128_256, true),
        (Shape::Omni7b, 152_064, false),
        (Shape::EmbeddingGemma, 262_144, true),
    ] {
        let file = shape.writer();
        let Some(Value::Array(Array::String(tokens))) = file.get("tokenizer.ggml.tokens") else {
            panic!("{}: no vocabulary", shape.name());
        };
        assert_eq!(tokens.len(), n_vocab, "{}", shape.name());
        assert_eq!(file.tensor("output.weight").is_none(), tied, "{}", shape.name());
    }
}

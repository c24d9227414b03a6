//! A file that grows: what the shapes have in common.

use super::super::tensor::{Tensor, TensorType};
use super::super::value::Value;
use super::super::vocab::Vocab;
use super::super::writer::Writer;
use super::Shape;
use super::mix::Mix;

/// A model's dimensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dimensions {
    pub(super) n_layer: u32,
    pub(super) n_embd: u32,
    pub(super) n_ff: u32,
    pub(super) n_head: u32,
    pub(super) n_head_kv: u32,
    pub(super) n_ctx: u32,
    pub(super) rope_freq_base: f32,
}

impl Dimensions {
    pub(super) fn head_size(&self) -> u32 {
        self.n_embd / self.n_head
    }
}

pub(super) struct Body {
    pub(super) writer: Writer,
    arch: &'static str,
    mix: Mix,
    dimensions: Dimensions,
}

impl Body {
    /// The general keys, the dimensions and the vocabulary.
    pub(super) fn new(
        shape: Shape,
        arch: &'static str,
        mix: Mix,
        dimensions: Dimensions,
        vocab: &Vocab,
    ) -> Self {
        let mut body = Self { writer: Writer::new(), arch, mix, dimensions };
        let w = &mut body.writer;
        w.set("general.architecture", arch);
        w.set("general.name", shape.name());
        w.set("general.description", "random weights, to measure with");
        w.set("general.file_type", mix.file_type());
        w.set("general.quantization_version", 2_u32);
        body.key("block_count", dimensions.n_layer);
        body.key("context_length", dimensions.n_ctx);
        body.key("embedding_length", dimensions.n_embd);
        body.key("feed_forward_length", dimensions.n_ff);
        body.key("attention.head_count", dimensions.n_head);
        body.key("rope.freq_base", dimensions.rope_freq_base);
        vocab.put(&mut body.writer);
        body
    }

    /// Sets a key of the architecture.
    pub(super) fn key(&mut self, name: &str, value: impl Into<Value>) {
        self.writer.set(format!("{}.{name}", self.arch), value);
    }

    /// One row for each token, of the output matrix's type where it is one. The deviation of the output is four times
    /// a matrix's: one token is much likelier than the others then, and sampling does not fall on silent ones either.
    pub(super) fn embedding(&mut self, vocab: &Vocab, output: bool, silent: u64) {
        let kind = if output { self.mix.output() } else { self.mix.matrix() };
        self.vocabulary("token_embd", kind, vocab, if output { 4.0 } else { 1.0 }, silent);
    }

    /// An output matrix beside the embedding.
    pub(super) fn output(&mut self, vocab: &Vocab) {
        self.vocabulary("output", self.mix.output(), vocab, 4.0, vocab.wordless() as u64);
    }

    /// A random matrix that keeps the root mean square of what it multiplies.
    pub(super) fn matrix(&mut self, name: &str, n_in: u32, n_out: u32) {
        self.matrix_of(self.mix.matrix(), name, n_in, n_out);
    }

    /// A norm's weights, all 1.
    pub(super) fn norm(&mut self, name: &str, n: u32) {
        let ones = |_, out: &mut [f32]| out.fill(1.0);
        self.writer.push(Tensor::new(format!("{name}.weight"), [u64::from(n)], TensorType::F32, ones));
    }

    /// A bias, all 0.
    pub(super) fn bias(&mut self, name: &str, n: u32) {
        self.writer.push(Tensor::new(format!("{name}.bias"), [u64::from(n)], TensorType::F32, |_, _| {}));
    }

    /// Queries, keys, values and the way back, of block `block`: the attention numbered `i` of `n`.
    pub(super) fn attention(&mut self, block: &str, i: u32, n: u32) {
        let Dimensions { n_embd, n_head_kv, .. } = self.dimensions;
        let n_kv = self.dimensions.head_size() * n_head_kv;
        self.matrix(&format!("{block}.attn_q"), n_embd, n_embd);
        self.matrix(&format!("{block}.attn_k"), n_embd, n_kv);
        self.matrix_of(self.mix.sensitive(i, n), &format!("{block}.attn_v"), n_embd, n_kv);
        self.matrix(&format!("{block}.attn_output"), n_embd, n_embd);
    }

    /// The gated feed-forward network of block `i`.
    pub(super) fn gated(&mut self, block: &str, i: u32) {
        let Dimensions { n_layer, n_embd, n_ff, .. } = self.dimensions;
        self.matrix(&format!("{block}.ffn_gate"), n_embd, n_ff);
        self.matrix(&format!("{block}.ffn_up"), n_embd, n_ff);
        self.matrix_of(self.mix.sensitive(i, n_layer), &format!("{block}.ffn_down"), n_ff, n_embd);
    }

    fn matrix_of(&mut self, kind: TensorType, name: &str, n_in: u32, n_out: u32) {
        let deviation = 1.0 / (n_in as f32).sqrt();
        let shape = [u64::from(n_in), u64::from(n_out)];
        self.writer.push(Tensor::random(format!("{name}.weight"), shape, kind, deviation, 0));
    }

    fn vocabulary(&mut self, name: &str, kind: TensorType, vocab: &Vocab, gain: f32, silent: u64) {
        let n_embd = self.dimensions.n_embd;
        let shape = [u64::from(n_embd), vocab.len() as u64];
        let deviation = gain / (n_embd as f32).sqrt();
        self.writer.push(Tensor::random(format!("{name}.weight"), shape, kind, deviation, silent));
    }
}

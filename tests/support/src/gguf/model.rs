//! Which model, how large, and the parts that all models share.

use std::path::Path;

use super::bert;
use super::damage::Damage;
use super::decoder;
use super::error::Error;
use super::gemma;
use super::random::Random;
use super::tensor::{Tensor, TensorType};
use super::value::Value;
use super::vocab::Vocab;
use super::writer::Writer;

/// What a model is for, and its architecture in llama.cpp.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Text, `llama`: attention in every block, chatml template, no token put before a text.
    Llama,
    /// Text, `lfm2`: convolution and attention blocks by turns, chatml template that begins with the first token,
    /// which the tokenizer puts before a text as well.
    Lfm2,
    /// Text, `qwen2vl`: as [`Llama`](Self::Llama), with a rotary embedding in sections; the text part of Qwen2.5-Omni.
    Qwen2Vl,
    /// Embeddings, `bert` with mean pooling.
    BertEmbedding,
    /// Scores of labels, `bert` with pooling `rank`.
    BertClassifier {
        /// Label and keywords. A keyword is one word of letters and digits; it speaks for its label in whatever case
        /// and with or without accents, and longer words that begin with it do too, unless they are known themselves.
        labels: Vec<(String, Vec<String>)>,
    },
    /// Embeddings, `gemma-embedding` with mean pooling and a sliding window in every other block; see
    /// [`dense`](Model::dense).
    GemmaEmbedding,
}

/// A model in the making: a kind, and settings that all have defaults.
///
/// By default a file is below 2 MB and its weights are Q8_0. A text model says four clauses of nine tokens in English
/// and Spanish and may stop after the second.
///
/// Embeddings reflect the words that texts have in common and nothing else: a text's vector is close to the sum of
/// its words' random vectors. Common words such as "the" count little, words that are no token count by their parts.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) kind: Kind,
    pub(crate) seed: u64,
    pub(crate) endless: bool,
    pub(crate) says: Vec<String>,
    pub(crate) dense: bool,
    pub(crate) n_ctx_train: u32,
    pub(crate) n_embd: u32,
    pub(crate) n_layer: u32,
    pub(crate) n_head: u32,
    pub(crate) n_head_kv: u32,
    pub(crate) n_ff: u32,
    n_vocab: Option<u32>,
    weights: TensorType,
}

/// What the width of the state is a multiple of: whole blocks of quantised numbers, and enough orthogonal directions
/// for the text models.
pub(crate) const WIDTH_STEP: u32 = 64;

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: $type) -> Self {
            self.$name = $name;
            self
        }
    )*};
}

impl Model {
    /// A small model of this kind.
    pub fn new(kind: Kind) -> Self {
        // The wider, the less random vectors have in common by chance.
        let (n_ctx_train, n_embd, n_layer, n_head, n_head_kv) = match kind {
            Kind::Llama | Kind::Qwen2Vl => (2048, 192, 2, 6, 2),
            Kind::Lfm2 => (2048, 192, 4, 6, 2),
            Kind::BertEmbedding | Kind::BertClassifier { .. } => (512, 256, 2, 4, 4),
            Kind::GemmaEmbedding => (2048, 256, 2, 4, 1),
        };
        Self {
            kind,
            seed: 0,
            endless: false,
            says: Vec::new(),
            dense: false,
            n_ctx_train,
            n_embd,
            n_layer,
            n_head,
            n_head_kv,
            n_ff: 256,
            n_vocab: None,
            weights: TensorType::Q8_0,
        }
    }

    settings! {
        /// Decides every weight and what is said.
        seed: u64;
        /// A text model begins again instead of ending.
        endless: bool;
        /// [`Kind::GemmaEmbedding`] has its dense modules behind the pooling.
        dense: bool;
        /// The longest context, in tokens.
        n_ctx_train: u32;
        /// The width of the state, a multiple of 64.
        n_embd: u32;
        /// The number of blocks, 1 to 512; 2 or more for [`Kind::Lfm2`] and
        /// [`Kind::GemmaEmbedding`], which have two sorts of them.
        n_layer: u32;
        /// The attention heads; `n_embd / n_head` has to be even.
        n_head: u32;
        /// The heads of keys and values, a divisor of `n_head`.
        n_head_kv: u32;
        /// The width of the feed-forward networks, a multiple of 32.
        n_ff: u32;
        /// The type of the large tensors.
        weights: TensorType;
    }

    /// A text model says these texts, each of which becomes one token, and ends; at most 60 of them.
    #[must_use]
    pub fn says<'a>(mut self, texts: impl IntoIterator<Item = &'a str>) -> Self {
        self.says = texts.into_iter().map(str::to_owned).collect();
        self
    }

    /// Fills the vocabulary up to this size with tokens that never occur.
    #[must_use]
    pub fn n_vocab(mut self, n_vocab: u32) -> Self {
        self.n_vocab = Some(n_vocab);
        self
    }

    /// The whole file in memory.
    ///
    /// # Errors
    /// [`Error::Setting`] and [`Error::Label`] for what cannot be made.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        self.writer()?.to_bytes()
    }

    /// Creates or replaces the file at `path`, which appears there when it is complete.
    ///
    /// # Errors
    /// As [`Model::to_bytes`], and [`Error::Io`] where the file system refuses.
    pub fn write_to(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        self.writer()?.create(path)
    }

    /// The file with something wrong in it, in memory.
    ///
    /// # Errors
    /// As [`Model::to_bytes`], and [`Error::Damage`] where the file has nothing that could be damaged like this.
    pub fn damaged(&self, damage: &Damage) -> Result<Vec<u8>, Error> {
        damage.done_to(self.writer()?)
    }

    /// The file before it is written, to be changed at will.
    ///
    /// # Errors
    /// As [`Model::to_bytes`].
    pub fn writer(&self) -> Result<Writer, Error> {
        self.check()?;
        match &self.kind {
            Kind::Llama => decoder::llama(self),
            Kind::Qwen2Vl => decoder::qwen2vl(self),
            Kind::Lfm2 => decoder::lfm2(self),
            Kind::BertEmbedding => bert::embedding(self),
            Kind::BertClassifier { labels } => bert::classifier(self, labels),
            Kind::GemmaEmbedding => gemma::embedding(self),
        }
    }

    pub(crate) fn head_size(&self) -> u32 {
        self.n_embd / self.n_head
    }

    fn check(&self) -> Result<(), Error> {
        let rule = |holds: bool, name, rule: &str| match holds {
            true => Ok(()),
            false => Err(Error::Setting { name, rule: rule.to_owned() }),
        };
        rule(self.n_ctx_train > 0, "n_ctx_train", "1 or more")?;
        rule(self.n_embd > 0 && self.n_embd.is_multiple_of(WIDTH_STEP), "n_embd", "a multiple of 64")?;
        rule(self.n_ff > 0 && self.n_ff.is_multiple_of(32), "n_ff", "a multiple of 32")?;
        rule((1..=512).contains(&self.n_layer), "n_layer", "from 1 to 512")?;
        let two_sorts = matches!(self.kind, Kind::Lfm2 | Kind::GemmaEmbedding);
        rule(!two_sorts || self.n_layer > 1, "n_layer", "2 or more for lfm2 and gemma-embedding")?;
        let heads =
            self.n_head > 0 && self.n_embd.is_multiple_of(self.n_head) && self.head_size().is_multiple_of(2);
        rule(heads, "n_head", "a divisor of n_embd that leaves an even head size")?;
        let differ = (1..self.says.len()).all(|i| !self.says[..i].contains(&self.says[i]));
        rule(self.says.len() <= 60 && differ, "says", "at most 60 texts, no two of them the same")?;
        rule(
            self.n_head_kv > 0 && self.n_head.is_multiple_of(self.n_head_kv),
            "n_head_kv",
            "a divisor of n_head",
        )
    }
}

/// A file that grows: what the architectures have in common.
pub(crate) struct Build<'a> {
    pub(crate) writer: Writer,
    model: &'a Model,
    arch: &'static str,
}

impl<'a> Build<'a> {
    /// The general keys, the dimensions, and the vocabulary, filled up to the size asked for.
    pub(crate) fn new(model: &'a Model, arch: &'static str, vocab: &mut Vocab) -> Result<Self, Error> {
        if let Some(n) = model.n_vocab {
            if (n as usize) < vocab.len() {
                let rule = format!("{} or more for {arch}", vocab.len());
                return Err(Error::Setting { name: "n_vocab", rule });
            }
            vocab.fill_up(n as usize);
        }
        let mut build = Self { writer: Writer::new(), model, arch };
        let w = &mut build.writer;
        w.set("general.architecture", arch);
        w.set("general.name", format!("synthetic {arch}"));
        w.set("general.description", format!("made for tests, seed {}", model.seed));
        w.set("general.file_type", model.weights.file_type());
        w.set("general.quantization_version", 2_u32);
        build.key("block_count", model.n_layer);
        build.key("context_length", model.n_ctx_train);
        build.key("embedding_length", model.n_embd);
        build.key("feed_forward_length", model.n_ff);
        build.key("attention.head_count", model.n_head);
        vocab.put(&mut build.writer);
        Ok(build)
    }

    /// Sets a key of the architecture.
    pub(crate) fn key(&mut self, name: &str, value: impl Into<Value>) {
        self.writer.set(format!("{}.{name}", self.arch), value);
    }

    /// A large tensor with rows of `n_embd` numbers.
    pub(crate) fn rows(
        &mut self,
        name: &str,
        rows: usize,
        fill: impl Fn(u64, &mut [f32]) + Send + Sync + 'static,
    ) {
        let shape = [u64::from(self.model.n_embd), rows as u64];
        self.writer.push(Tensor::new(name, shape, self.model.weights, fill));
    }

    /// A random matrix from `n_in` to `n_out` numbers that multiplies their root mean square by `gain`.
    pub(crate) fn matrix(&mut self, name: &str, n_in: u32, n_out: u32, gain: f32) {
        let name = format!("{name}.weight");
        let (seed, stream) = (self.model.seed, name.clone());
        let deviation = gain / (n_in as f32).sqrt();
        self.writer.push(Tensor::new(
            name,
            [u64::from(n_in), u64::from(n_out)],
            self.model.weights,
            move |row, out| {
                Random::new(seed, &stream, row).add_noise(deviation, out);
            },
        ));
    }

    /// A vector of `n` times `value`, such as a norm's weight.
    pub(crate) fn constant(&mut self, name: &str, n: u32, value: f32) {
        self.writer.push(Tensor::new(name, [u64::from(n)], TensorType::F32, move |_, out| out.fill(value)));
    }

    /// Queries, keys, values and the way back, of block `block`.
    pub(crate) fn attention(&mut self, block: &str, gain: f32) {
        let n = self.model.n_embd;
        let n_kv = self.model.head_size() * self.model.n_head_kv;
        self.matrix(&format!("{block}.attn_q"), n, n, 1.0);
        self.matrix(&format!("{block}.attn_k"), n, n_kv, 1.0);
        self.matrix(&format!("{block}.attn_v"), n, n_kv, 1.0);
        self.matrix(&format!("{block}.attn_output"), n, n, gain);
    }

    /// A gated feed-forward network.
    pub(crate) fn gated(&mut self, block: &str, gain: f32) {
        let (n, n_ff) = (self.model.n_embd, self.model.n_ff);
        self.matrix(&format!("{block}.ffn_gate"), n, n_ff, 1.0);
        self.matrix(&format!("{block}.ffn_up"), n, n_ff, 1.0);
        self.matrix(&format!("{block}.ffn_down"), n_ff, n, gain);
    }
}

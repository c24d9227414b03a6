//! What a load will take of memory: a pure function of the file's header and the settings, and beside it what the same
//! load took before.

use sarai_core::config::{Context, KvCacheType};
use sarai_core::memory::Estimate;
use sarai_core::request::Capability;
use sarai_core::units::Bytes;

use super::check::{head_length, is_encoder, largest};
use super::context::{self, Pooling};
use super::header::{Header, Value};
use super::projector::Projection;
use super::took::Past;
use super::{GgufSettings, encoder, engine, runtime};

/// Most tokens in one step while prompts are read. The engine cuts steps by time; this bounds their buffers.
const MOST_IN_STEP: u32 = 512;

/// The contexts that `auto` chooses among, longest first; see [`by_memory`]. Those beyond 8000 only where its bounds say so.
const AUTO: [u32; 9] = [128_000, 64_000, 32_000, 16_000, 8000, 6000, 4000, 2000, 1000];

/// The same for a model that reads whole texts at once: its compute buffers grow with the square.
const AUTO_ENCODER: [u32; 3] = [2048, 1024, 512];

/// The architectures whose buffers were compared with what models of them really took. Of any other, every block is taken to
/// keep keys and values, also where only some do, and a recurrent state where its header has one; and its compute buffers are
/// counted twice.
const MEASURED: [&str; 7] = ["llama", "lfm2", "qwen2", "qwen2vl", "bert", "gemma-embedding", "gemma3"];

/// What a vocabulary's entry takes in llama.cpp: the text in three tables with their nodes; and a merge, two texts in
/// one. Counted from the structures of llama-vocab.cpp, rounded up.
const TOKEN_BYTES: u64 = 160;
const MERGE_BYTES: u64 = 192;

/// Thread, graph metadata and what the allocators keep.
const BASE_BYTES: u64 = 4 << 20;

/// The estimate for the longest context that memory allows: where the context is `auto` and it does not fit beside the
/// weights, a shorter one is tried before the load is given up. A context can become shorter later where it is kept for
/// what comes next, which that of a model that reads whole texts is not.
pub(super) fn estimate(
    header: &Header,
    projection: Option<&Projection>,
    settings: &GgufSettings,
    available: Bytes,
) -> Estimate {
    let (contexts, past) = (contexts(header, settings, available), Past::of(settings));
    let at = |n_ctx| {
        let projector = projection.map_or(Bytes::ZERO, |projection| projection.bytes(n_ctx));
        past.complete(Estimate { projector, ..estimate_at(header, settings, n_ctx) })
    };
    let mut all = contexts.into_iter().map(at);
    let mut estimate = all.next().unwrap_or_else(|| at(1));
    while estimate.at_load() > available
        && let Some(shorter) = all.next()
    {
        estimate = shorter;
    }
    if settings.purpose == Capability::Generate {
        estimate.shorter = all.collect();
    }
    estimate
}

fn estimate_at(header: &Header, settings: &GgufSettings, n_ctx: u32) -> Estimate {
    let shape = Shape::of(header);
    let made = self::shape(header, settings, n_ctx);
    let (step, outputs) = (made.n_batch, made.n_outputs.unwrap_or(made.n_batch));
    let kv = || shape.kv_bytes(header, settings.kv_cache_type, n_ctx.into(), made.n_seq.into());
    Estimate {
        weights: weights(header),
        kv: if is_encoder(header) { Bytes::ZERO } else { kv() },
        compute: shape.compute_bytes(
            step.into(),
            n_ctx.into(),
            if is_encoder(header) { 0 } else { outputs.into() },
        ),
        projector: Bytes::ZERO,
        overhead: Bytes(overhead(header)) + adapters(settings),
        passing: if made.scoreless { shape.scores(step.into()) } else { Bytes::ZERO },
        n_ctx: Some(n_ctx),
        ..Estimate::default()
    }
}

/// The context that is made for a file.
pub(super) fn shape(header: &Header, settings: &GgufSettings, n_ctx: u32) -> context::Shape {
    let generates = settings.purpose == Capability::Generate;
    let n_seq = if generates { engine::sequences(settings.parallel()) } else { encoder::TEXTS };
    context::Shape {
        n_ctx,
        n_batch: step(header, settings.purpose, n_ctx, n_seq),
        n_seq,
        // One for each; only some of them run at once.
        n_outputs: generates.then_some(n_seq),
        threads: settings.threads.unwrap_or_else(runtime::cpus),
        kv_cache_type: settings.kv_cache_type,
        scoreless: is_encoder(header),
        pooling: match settings.purpose {
            Capability::Generate | Capability::See | Capability::Hear | Capability::Transcribe => None,
            // A model without a pooling of its own, as most that generate.
            Capability::Embed if header.int("{arch}.pooling_type").is_none_or(|pooling| pooling == 0) => {
                Some(Pooling::Mean)
            }
            Capability::Embed => Some(Pooling::Own),
            Capability::Classify | Capability::Rerank => Some(Pooling::Rank),
        },
    }
}

/// Adapters are small, and held in memory whole. One that cannot be read fails the load, with its name.
fn adapters(settings: &GgufSettings) -> Bytes {
    settings
        .lora
        .iter()
        .filter_map(|(path, _)| std::fs::metadata(path).ok())
        .map(|file| Bytes(file.len()))
        .sum()
}

/// Tokens in one step: all at once for whole texts, a part of prompts. llama.cpp plans a step of equal parts for all
/// sequences.
fn step(header: &Header, purpose: Capability, n_ctx: u32, n_seq: u32) -> u32 {
    if is_encoder(header) || purpose != Capability::Generate {
        return n_ctx.next_multiple_of(n_seq);
    }
    // A token of each sequence that writes has to fit, however short the context is.
    let most = MOST_IN_STEP.min(n_ctx).max(n_seq);
    most - most % n_seq
}

/// The context lengths to try, longest first: by free memory where it is `auto`, never above what the model was trained
/// for.
fn contexts(header: &Header, settings: &GgufSettings, available: Bytes) -> Vec<u32> {
    let trained = trained(header);
    let mut contexts: Vec<u32> = match settings.context {
        Context::Fixed(n) => vec![n],
        Context::Auto { min, max } if settings.purpose == Capability::Generate => {
            let most = by_memory(available);
            AUTO.into_iter().filter(|n| *n <= most).map(|n| n.clamp(min, max.max(min))).collect()
        }
        Context::Auto { max, .. } => AUTO_ENCODER.into_iter().map(|n| n.min(max)).collect(),
    };
    for n_ctx in &mut contexts {
        *n_ctx = (*n_ctx).min(trained).max(1);
    }
    contexts.dedup();
    contexts
}

fn by_memory(available: Bytes) -> u32 {
    match available.as_gb() {
        gb if gb < 1.0 => 1000,
        gb if gb < 2.0 => 2000,
        gb if gb < 4.0 => 4000,
        gb if gb < 8.0 => 6000,
        // As much for each GB from there on.
        gb => (gb * 1000.0) as u32,
    }
}

/// Says so where a model gets a shorter context than its settings name, because it was trained for no more.
pub(super) fn warn_of_cut(header: &Header, settings: &GgufSettings) {
    let asked = match settings.context {
        Context::Fixed(n) => n,
        Context::Auto { min, .. } => min,
    };
    let trained = trained(header);
    if asked > trained {
        tracing::warn!(
            path = %settings.path.display(), asked, trained,
            "the model was trained for a shorter context than its settings name: it has that"
        );
    }
}

/// The longest context that a model was trained for, where its file says so.
fn trained(header: &Header) -> u32 {
    header.int("{arch}.context_length").and_then(|n| u32::try_from(n).ok()).unwrap_or(u32::MAX)
}

fn weights(header: &Header) -> Bytes {
    Bytes(header.tensors.iter().map(|tensor| tensor.bytes).sum())
}

fn overhead(header: &Header) -> u64 {
    let entries = |key| header.array(key).map_or(0, |entries| entries.len() as u64);
    let vocabulary =
        entries("tokenizer.ggml.tokens") * TOKEN_BYTES + entries("tokenizer.ggml.merges") * MERGE_BYTES;
    vocabulary + BASE_BYTES
}

/// The sizes that decide about buffers. The header's numbers are below 2³² ([`check`](super::check)), so that no product
/// here can overflow.
struct Shape {
    blocks: u64,
    width: u128,
    feed_forward: u128,
    heads: u128,
    vocabulary: u128,
    measured: bool,
}

impl Shape {
    fn of(header: &Header) -> Self {
        let int = |key| header.int(key).unwrap_or(0);
        Self {
            blocks: int("{arch}.block_count"),
            width: int("{arch}.embedding_length").into(),
            feed_forward: u128::from(largest(header, "{arch}.feed_forward_length")).max(
                u128::from(int("{arch}.expert_feed_forward_length"))
                    * u128::from(int("{arch}.expert_used_count")),
            ),
            heads: largest(header, "{arch}.attention.head_count").max(1).into(),
            vocabulary: header.array("tokenizer.ggml.tokens").map_or(0, |tokens| tokens.len() as u128),
            measured: MEASURED.contains(&header.architecture()),
        }
    }

    /// Keys and values of every attention block for each token of the context, a sliding window's too, because the engine
    /// keeps all of it; for a convolution block (no KV heads) its state, which every sequence has one of and which does not
    /// grow with the context.
    fn kv_bytes(&self, header: &Header, kind: KvCacheType, n_ctx: u128, n_seq: u128) -> Bytes {
        // llama.cpp rounds the cache up to a multiple of 256 cells.
        let cells = n_ctx.next_multiple_of(256);
        let (elements, bytes_of_these) = kind.block();
        let token: u128 = ["key", "value"].map(|which| u128::from(head_length(header, which))).iter().sum();
        let state = header.int("{arch}.shortconv.l_cache").map_or(0, u128::from) * self.width * 4;
        let block = |block| match kv_heads(header, block, self.heads) {
            0 => state * n_seq,
            heads => heads * token * cells * u128::from(bytes_of_these) / u128::from(elements),
        };
        let recurrent = self.recurrent_bytes(header) * n_seq * u128::from(self.blocks);
        bytes((0..self.blocks).map(block).sum::<u128>() + recurrent)
    }

    /// The state of a Mamba or RWKV block, in F32 (`llama_hparams::n_embd_r` and `n_embd_s`).
    fn recurrent_bytes(&self, header: &Header) -> u128 {
        let int = |key| u128::from(header.int(key).unwrap_or(0));
        let (inner, state) = (int("{arch}.ssm.inner_size"), int("{arch}.ssm.state_size"));
        let convolved = inner + 2 * int("{arch}.ssm.group_count") * state;
        let mamba = int("{arch}.ssm.conv_kernel").saturating_sub(1) * convolved + state * inner;
        let rwkv = match int("{arch}.wkv.head_size") {
            0 => 0,
            head => self.width * (head + int("{arch}.token_shift_count").max(2)),
        };
        (mamba + rwkv) * 4
    }

    /// The largest intermediate results that are alive together in a step, in F32: two states and the feed-forward's
    /// halves, and the logits. Besides, where tokens are generated, the attention's mask in F32 and F16, because flash
    /// attention keeps no scores; else the scores.
    fn compute_bytes(&self, step: u128, n_ctx: u128, outputs: u128) -> Bytes {
        let states = step * (2 * self.width + 2 * self.feed_forward) * 4;
        let scores =
            if outputs > 0 { step * n_ctx.next_multiple_of(256) * 6 } else { step * n_ctx * self.heads * 4 };
        // Once in the graph, once where they are read.
        let logits = 2 * outputs * self.vocabulary * 4;
        bytes((states + scores + logits) * if self.measured { 1 } else { 2 })
    }
}

impl Shape {
    /// A score of each token of the vocabulary at each token of a step.
    fn scores(&self, step: u128) -> Bytes {
        bytes(step * self.vocabulary * 4)
    }
}

/// KV heads of a block: one number for all, or one for each.
fn kv_heads(header: &Header, block: u64, heads: u128) -> u128 {
    let own = match header.value("{arch}.attention.head_count_kv") {
        Some(Value::Array(each)) => each.get(block as usize).and_then(Value::as_int),
        Some(one) => one.as_int(),
        None => None,
    };
    own.map_or(heads, u128::from)
}

fn bytes(count: u128) -> Bytes {
    Bytes(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use sarai_support::gguf::{Kind, Model};

    use super::*;
    use crate::llama::header::TensorInfo;

    fn estimated(model: &Model, context: Context, available: Bytes) -> Estimate {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        model.write_to(&path).unwrap();
        let header = Header::read(&path).unwrap();
        let purpose = if is_encoder(&header) { Capability::Embed } else { Capability::Generate };
        estimate(&header, None, &GgufSettings { context, ..GgufSettings::new(path, purpose) }, available)
    }

    const ANY: Context = Context::Auto { min: 1, max: u32::MAX };

    #[test]
    fn the_context_follows_free_memory_and_stops_at_what_the_model_was_trained_for() {
        let model = Model::new(Kind::Llama).n_ctx_train(7000);
        let n_ctx = |gb, context| estimated(&model, context, Bytes::from_gb(gb)).n_ctx.unwrap();
        let by_table = [0.5, 1.5, 3.0, 6.0, 20.0].map(|gb| n_ctx(gb, ANY));
        assert_eq!(by_table, [1000, 2000, 4000, 6000, 7000]);
        assert_eq!(n_ctx(0.5, Context::Auto { min: 1500, max: 9000 }), 1500);
        assert_eq!(n_ctx(20.0, Context::Auto { min: 1, max: 1200 }), 1200);
        assert_eq!(n_ctx(0.5, Context::Fixed(3000)), 3000);
        assert_eq!(n_ctx(20.0, Context::Fixed(9000)), 7000);
    }

    #[test]
    fn where_its_bounds_allow_more_a_context_goes_on_growing_with_free_memory() {
        let model = Model::new(Kind::Llama).n_ctx_train(1_000_000);
        let n_ctx = |gb, max| {
            let estimate = estimated(&model, Context::Auto { min: 1000, max }, Bytes::from_gb(gb));
            let shorter: Vec<u32> = estimate.shorter.iter().filter_map(|shorter| shorter.n_ctx).collect();
            (estimate.n_ctx.unwrap(), shorter)
        };
        let by_memory = [9.0, 16.0, 40.0, 70.0, 1000.0].map(|gb| n_ctx(gb, 100_000).0);
        assert_eq!(by_memory, [8000, 16_000, 32_000, 64_000, 100_000]);
        assert_eq!(n_ctx(40.0, 32_000), (32_000, vec![16_000, 8000, 6000, 4000, 2000, 1000]));
        assert_eq!((n_ctx(1000.0, 8000).0, n_ctx(20.0, 12_000).0), (8000, 12_000));
    }

    #[test]
    fn a_context_that_does_not_fit_beside_the_weights_gives_way_to_a_shorter_one() {
        // 1 GB of weights; 32 blocks of 32 heads of 128: 524 kB of keys and values for each token.
        let values = [("block_count", 32), ("embedding_length", 4096), ("attention.head_count", 32)]
            .map(|(key, n)| (format!("llama.{key}"), Value::Int(n)));
        let architecture = ("general.architecture".to_owned(), Value::Text("llama".to_owned()));
        let header = Header {
            path: "big.gguf".into(),
            values: values.into_iter().chain([architecture]).collect(),
            tensors: vec![TensorInfo { name: "w".to_owned(), shape: vec![], kind: 0, bytes: 1_000_000_000 }],
        };
        let n_ctx = |context, gb| {
            let settings = GgufSettings { context, ..GgufSettings::new(&header.path, Capability::Generate) };
            estimate(&header, None, &settings, Bytes::from_gb(gb)).n_ctx.unwrap()
        };
        assert_eq!(n_ctx(ANY, 9.0), 8000);
        assert_eq!(n_ctx(ANY, 2.5), 2000, "4000 tokens would be the table's choice, and take 3.1 GB");
        assert_eq!(n_ctx(ANY, 1.1), 1000, "the shortest, and the pool says that it does not fit");
        assert_eq!(n_ctx(Context::Auto { min: 3000, max: 8000 }, 2.5), 3000);
        assert_eq!(n_ctx(Context::Fixed(5000), 2.5), 5000);
    }

    #[test]
    fn keys_and_values_grow_with_the_context_and_not_for_convolutions() {
        let kv = |kind, n| {
            estimated(&Model::new(kind).n_ctx_train(9000), Context::Fixed(n), Bytes::from_gb(9.0)).kv.0
        };
        // 2 blocks, 2 of 6 heads of 32 keep keys and values: 2 · 2 · (32 + 32) · 2 bytes a token.
        assert_eq!(kv(Kind::Llama, 1024), 2 * 2 * 64 * 2 * 1024);
        assert_eq!(kv(Kind::Llama, 2048), 2 * kv(Kind::Llama, 1024));
        let (short, long) = (kv(Kind::Lfm2, 1024), kv(Kind::Lfm2, 2048));
        assert!(short < long && long < 2 * short, "{short} {long}");
        // 34 bytes for 32 numbers of 8 bits, instead of 64.
        let kept_as = |kv_cache_type| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            Model::new(Kind::Llama).write_to(&path).unwrap();
            let header = Header::read(&path).unwrap();
            let settings = GgufSettings { kv_cache_type, ..GgufSettings::new(path, Capability::Generate) };
            estimate_at(&header, &settings, 1024).kv.0
        };
        assert_eq!(kept_as(KvCacheType::Q8_0), kept_as(KvCacheType::F16) * 34 / 64);
        assert_eq!(kv(Kind::BertEmbedding, 512), 0);
    }

    /// A header of numbers alone.
    fn header(architecture: &str, numbers: &[(&str, u64)]) -> Header {
        let named = ("general.architecture".to_owned(), Value::Text(architecture.to_owned()));
        let numbers =
            numbers.iter().map(|(key, n)| (format!("{architecture}.{key}"), Value::Int((*n).into())));
        Header { path: "m.gguf".into(), values: numbers.chain([named]).collect(), tensors: Vec::new() }
    }

    #[test]
    fn an_architecture_that_was_never_measured_is_taken_to_keep_everything() {
        let numbers = [("block_count", 4), ("embedding_length", 64), ("attention.head_count", 2)];
        let settings = GgufSettings::new("m.gguf", Capability::Generate);
        let of = |architecture: &str, more: &[(&str, u64)]| {
            estimate_at(&header(architecture, &[&numbers, more].concat()), &settings, 1024)
        };
        let (known, unknown) = (of("llama", &[]), of("mystery", &[]));
        assert_eq!((unknown.kv, unknown.compute), (known.kv, Bytes(2 * known.compute.0)));
        // 12 sequences of 4 blocks: 3 columns of 128 + 2 · 1 · 16 and 128 · 16 numbers of 4 bytes.
        let state = [("inner_size", 128), ("state_size", 16), ("group_count", 1), ("conv_kernel", 4)]
            .map(|(key, n)| (format!("ssm.{key}"), n));
        let state = state.each_ref().map(|(key, n)| (key.as_str(), *n));
        let mamba = of("mamba2", &state);
        assert_eq!(mamba.kv.0 - unknown.kv.0, 12 * 4 * (3 * 160 + 128 * 16) * 4);
        // Six experts of 200 at once are more than one of 300.
        let experts =
            [("feed_forward_length", 300), ("expert_feed_forward_length", 200), ("expert_used_count", 6)];
        assert!(of("llama", &experts).compute > of("llama", &[("feed_forward_length", 1000)]).compute);
    }

    #[test]
    fn numbers_that_make_no_sense_give_an_estimate_all_the_same() {
        let settings = GgufSettings::new("m.gguf", Capability::Generate);
        let keys = ["embedding_length", "attention.head_count", "attention.head_count_kv", "context_length"];
        let estimate = |value: Option<Value>| {
            let mut header = header("llama", &[("block_count", 512)]);
            if let Some(value) = value {
                header.values.extend(keys.map(|key| (format!("llama.{key}"), value.clone())));
            }
            estimate(&header, None, &settings, Bytes::from_gb(f64::NAN))
        };
        let none = estimate(None);
        assert!(none.total() >= Bytes(BASE_BYTES), "never nothing: {none:?}");
        for value in [Value::Float(f64::NAN), Value::Float(f64::INFINITY), Value::Int(-1), Value::Bool(true)]
        {
            assert_eq!(estimate(Some(value)).total(), none.total(), "what is no number counts as left out");
        }
        assert!(estimate(Some(Value::Int(0))).total() >= Bytes(BASE_BYTES));
        let most = estimate(Some(Value::Int(u32::MAX.into())));
        assert!(most.total() > Bytes(1 << 50), "the largest numbers make no small one again: {most:?}");
    }

    #[test]
    fn weights_are_the_sum_of_the_tensors() {
        let model = Model::new(Kind::Llama);
        let tensors = model.writer().unwrap().tensor_bytes().unwrap();
        assert_eq!(estimated(&model, ANY, Bytes::from_gb(1.0)).weights, Bytes(tensors));
    }
}

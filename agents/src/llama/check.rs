//! Checks what would end the process in llama.cpp instead of returning an error. Each was found by feeding a broken
//! file to the llama.cpp that is built in.

use std::collections::BTreeSet;

use sarai_core::config::KvCacheType;
use sarai_core::request::Capability;

use super::header::{Header, Value};
use crate::Error;

/// Layers that llama.cpp has room for (`LLAMA_MAX_LAYERS`).
const MOST_LAYERS: u64 = 512;

/// The types I8, I16, I32, I64 and F64 (`ggml_type`).
pub(super) const INTEGERS: std::ops::RangeInclusive<u32> = 24..=28;

/// Architectures whose graphs ask that keys and values of a head are of one length and turned as a whole; of all that do,
/// those that are common.
const WHOLE_HEADS: [&str; 24] = [
    "baichuan",
    "deepseek",
    "exaone",
    "falcon",
    "granite",
    "internlm2",
    "llama",
    "llama4",
    "mistral3",
    "olmo",
    "olmo2",
    "olmoe",
    "orion",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "qwen3vl",
    "qwen3vlmoe",
    "seed_oss",
    "smollm3",
    "starcoder2",
    "xverse",
];

/// The highest `pooling_type` (`LLAMA_POOLING_TYPE_RANK`).
const POOLING_RANK: u64 = 4;

/// Whether llama.cpp may see the file.
pub(super) fn check(header: &Header) -> Result<(), Error> {
    let architecture = header.architecture();
    if architecture.is_empty() {
        return Err(header.bad("has no general.architecture: it is not a model"));
    }
    if matches!(architecture, "clip" | "mmproj") {
        return Err(header.bad("is a projector for images or audio, not a model; name it under mmproj:"));
    }
    for key in ["block_count", "embedding_length", "context_length"] {
        if header.int(&format!("{{arch}}.{key}")).is_none_or(|n| n == 0) {
            return Err(header.bad(format!("has no usable {architecture}.{key}")));
        }
    }
    check_numbers(header)?;
    // The process ends when it multiplies with them.
    if let Some(tensor) =
        header.tensors.iter().find(|t| INTEGERS.contains(&t.kind) && t.name.ends_with(".weight"))
    {
        return Err(
            header.bad(format!("has weights of the unsuitable type {} in {}", tensor.kind, tensor.name))
        );
    }
    if header.int("{arch}.pooling_type").is_some_and(|pooling| pooling > POOLING_RANK) {
        return Err(header.bad(format!("has an unknown {architecture}.pooling_type")));
    }
    check_blocks(header)?;
    check_vocabulary(header)?;
    check_sections(header)?;
    if WHOLE_HEADS.contains(&architecture) {
        check_whole_heads(header)?;
    }
    match architecture {
        "gemma-embedding" => check_gemma_embedding(header),
        "bert" => check_bert(header),
        _ => Ok(()),
    }
}

/// Whether the model's keys and values can be kept as asked: in whole blocks for each head.
pub(super) fn can_keep(header: &Header, kind: KvCacheType) -> Result<(), Error> {
    let (block, _) = kind.block();
    let of_head = ["key", "value"].map(|which| head_length(header, which));
    match of_head.into_iter().find(|length| !length.is_multiple_of(block.into())) {
        None => Ok(()),
        Some(length) => Err(Error::WrongModel {
            path: header.path.clone(),
            wanted: "keep its context in that kv_cache_type".to_owned(),
            reason: format!("its heads of {length} are no multiple of {block}; use f16"),
        }),
    }
}

/// Numbers in the `key` or the `value` of a head.
pub(super) fn head_length(header: &Header, which: &str) -> u64 {
    let int = |key| header.int(key).unwrap_or(0);
    let heads = largest(header, "{arch}.attention.head_count").max(1);
    let own = header.int(&format!("{{arch}}.attention.{which}_length"));
    own.unwrap_or(int("{arch}.embedding_length") / heads)
}

/// The largest of a key's numbers, where it has one for each block.
pub(super) fn largest(header: &Header, key: &str) -> u64 {
    match header.value(key) {
        Some(Value::Array(each)) => each.iter().filter_map(Value::as_int).max().unwrap_or(0),
        Some(one) => one.as_int().unwrap_or(0),
        None => 0,
    }
}

/// Whether the model can do what it is wanted for.
pub(super) fn suits(header: &Header, purpose: Capability) -> Result<(), Error> {
    let unsuitable = |reason: &str| {
        Err(Error::WrongModel {
            path: header.path.clone(),
            wanted: purpose.to_string(),
            reason: reason.to_owned(),
        })
    };
    match purpose {
        Capability::Generate if is_encoder(header) => {
            unsuitable("it is an encoder; give it role: embedding or router")
        }
        Capability::Embed if header.int("{arch}.pooling_type") == Some(POOLING_RANK) => {
            unsuitable("it is made to score, not to embed (pooling_type 4); give it role: router")
        }
        Capability::Classify if labels(header).is_empty() => {
            unsuitable("its header names no labels (classifier.output_labels)")
        }
        Capability::Classify
            if header.tensor("cls.weight").is_none() && header.tensor("cls.output.weight").is_none() =>
        {
            unsuitable("it has no classification head (cls tensors)")
        }
        Capability::Rerank
            if header.tensor("cls.weight").is_none() && header.tensor("cls.output.weight").is_none() =>
        {
            unsuitable("it has no head that scores (cls tensors)")
        }
        Capability::Rerank if labels(header).len() > 1 => {
            unsuitable("it scores several labels; give it role: router")
        }
        Capability::See | Capability::Hear | Capability::Transcribe => {
            unsuitable("it has to be loaded to generate, with an mmproj")
        }
        Capability::Generate | Capability::Embed | Capability::Classify | Capability::Rerank => Ok(()),
    }
}

/// Whether the model reads a whole text at once and generates none.
pub(super) fn is_encoder(header: &Header) -> bool {
    let architecture = header.architecture();
    architecture.contains("bert")
        || architecture.ends_with("-embedding")
        || header.value("{arch}.attention.causal") == Some(&Value::Bool(false))
}

/// The labels of the classification head.
pub(super) fn labels(header: &Header) -> Vec<String> {
    let texts = |value: &Value| match value {
        Value::Text(label) => Some(label.clone()),
        _ => None,
    };
    header.array("{arch}.classifier.output_labels").unwrap_or_default().iter().filter_map(texts).collect()
}

/// Sizes that llama.cpp reads as 32-bit numbers, and the epsilons of its norms.
fn check_numbers(header: &Header) -> Result<(), Error> {
    for key in [
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "shortconv.l_cache",
        "expert_feed_forward_length",
        "expert_used_count",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.group_count",
        "ssm.conv_kernel",
        "wkv.head_size",
        "token_shift_count",
    ] {
        let too_large = |value: &Value| value.as_int().is_none_or(|n| n > u64::from(u32::MAX));
        let bad = match header.value(&format!("{{arch}}.{key}")) {
            Some(Value::Array(each)) => each.iter().any(too_large),
            Some(one) => too_large(one),
            None => false,
        };
        if bad {
            return Err(header.bad(format!("has no usable {}.{key}", header.architecture())));
        }
    }
    // ggml asks that they are not negative while it computes.
    for key in ["layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"] {
        let key = format!("attention.{key}");
        if let Some(Value::Float(epsilon)) = header.value(&format!("{{arch}}.{key}"))
            && !(epsilon.is_finite() && *epsilon >= 0.0)
        {
            return Err(header.bad(format!("has no usable {}.{key}", header.architecture())));
        }
    }
    Ok(())
}

fn check_blocks(header: &Header) -> Result<(), Error> {
    let count = header.int("{arch}.block_count").unwrap_or(0);
    let number = |name: &str| name.strip_prefix("blk.")?.split('.').next()?.parse::<u64>().ok();
    let there: BTreeSet<u64> = header.tensors.iter().filter_map(|tensor| number(&tensor.name)).collect();
    if count > MOST_LAYERS {
        return Err(header.bad(format!("has a block_count of {count}; {MOST_LAYERS} are the most")));
    }
    match (0..count).find(|block| !there.contains(block)) {
        Some(missing) => {
            Err(header.bad(format!("has a block_count of {count}, but no tensors of block {missing}")))
        }
        None => Ok(()),
    }
}

fn check_vocabulary(header: &Header) -> Result<(), Error> {
    let kind = header.text("tokenizer.ggml.model");
    if matches!(kind, Some("none" | "no_vocab")) {
        return Err(header.bad("has no vocabulary (tokenizer.ggml.model)"));
    }
    let Some(tokens) = header.array("tokenizer.ggml.tokens") else {
        return Err(header.bad("has no vocabulary (tokenizer.ggml.tokens)"));
    };
    let mut seen = BTreeSet::new();
    for token in tokens {
        let Value::Text(token) = token else {
            return Err(header.bad("has a vocabulary that is not made of texts"));
        };
        // llama.cpp reads them as C strings.
        let token = token.split('\0').next().unwrap_or_default();
        if !seen.insert(token) {
            return Err(header.bad(format!("has the token {token:?} twice in tokenizer.ggml.tokens")));
        }
    }
    for key in ["bos", "eos", "unknown", "padding", "seperator", "cls", "mask"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        if header.int(&key).is_some_and(|id| id >= tokens.len() as u64 && id != u64::from(u32::MAX)) {
            return Err(header.bad(format!("has a {key} outside its vocabulary of {} tokens", tokens.len())));
        }
    }
    if kind == Some("bert") {
        // Every text is put between these two; the numbers are llama.cpp's where the file has none.
        for (key, default) in [("bos", 101), ("seperator", 102)] {
            let key = format!("tokenizer.ggml.{key}_token_id");
            if header.int(&key).unwrap_or(default) >= tokens.len() as u64 {
                return Err(header.bad(format!("has no usable {key}")));
            }
        }
    }
    Ok(())
}

/// ggml asks that one of the first three is above 0, and all together no more than a head has (`ggml_mrope_cache_init`).
fn check_sections(header: &Header) -> Result<(), Error> {
    let numbers: Vec<Option<u64>> = match header.value("{arch}.rope.dimension_sections") {
        Some(Value::Array(each)) => each.iter().map(Value::as_int).collect(),
        Some(one) => vec![one.as_int(); 4],
        None => return Ok(()),
    };
    let key = format!("{}.rope.dimension_sections", header.architecture());
    let sum = numbers.iter().try_fold(0_u64, |sum, number| sum.checked_add((*number)?));
    if sum.is_none_or(|sum| sum > head_length(header, "key")) {
        return Err(header.bad(format!("has no usable {key}")));
    }
    if numbers.iter().take(3).all(|number| *number == Some(0)) {
        return Err(header.bad(format!("has only zeros in {key}")));
    }
    Ok(())
}

fn check_whole_heads(header: &Header) -> Result<(), Error> {
    let key = head_length(header, "key");
    let turned = header.int("{arch}.rope.dimension_count").unwrap_or(key);
    for (name, length) in
        [("attention.value_length", head_length(header, "value")), ("rope.dimension_count", turned)]
    {
        if length != key {
            let architecture = header.architecture();
            return Err(
                header.bad(format!("has a {architecture}.{name} of {length}, where its heads have {key}"))
            );
        }
    }
    Ok(())
}

fn check_gemma_embedding(header: &Header) -> Result<(), Error> {
    let width = header.int("{arch}.embedding_length").unwrap_or(0);
    let number = |key: &str| header.int(&format!("{{arch}}.{key}")).unwrap_or(0);
    let tensor = |name: &str| header.tensor(name).is_some();
    for (key, there) in
        [("dense_2_feat_in", tensor("dense_2.weight")), ("dense_3_feat_out", tensor("dense_3.weight"))]
    {
        if number(key) != width && (there || number(key) != 0) {
            return Err(header.bad(format!("has a {key} that differs from its embedding_length")));
        }
    }
    if tensor("dense_3.weight") {
        let (key, comes) = if tensor("dense_2.weight") {
            ("dense_2_feat_out", number("dense_2_feat_out"))
        } else {
            ("embedding_length", width)
        };
        if number("dense_3_feat_in") != comes {
            return Err(header.bad(format!("has a dense_3_feat_in that differs from its {key}")));
        }
    }
    check_heads(header)?;
    // The cache for full attention must have a block; by default every sixth has it.
    let pattern = header.int("{arch}.attention.sliding_window_pattern").unwrap_or(6);
    if pattern > 1 && header.int("{arch}.block_count").unwrap_or(0) < pattern {
        return Err(header.bad("has no block with full attention"));
    }
    Ok(())
}

/// For encoders llama.cpp takes the shapes of the attention from these keys without looking at the tensors.
fn check_heads(header: &Header) -> Result<(), Error> {
    let int = |key: &str| header.int(&format!("{{arch}}.{key}"));
    let head = int("embedding_length")
        .zip(int("attention.head_count"))
        .and_then(|(width, heads)| width.checked_div(heads));
    for (tensor, heads, length) in [
        ("attn_q", "attention.head_count", "attention.key_length"),
        ("attn_k", "attention.head_count_kv", "attention.key_length"),
        ("attn_v", "attention.head_count_kv", "attention.value_length"),
    ] {
        let heads_here = int(heads).or(int("attention.head_count"));
        let Some(rows) = heads_here.zip(int(length).or(head)).map(|(n, length)| n.saturating_mul(length))
        else {
            continue;
        };
        let name = format!("blk.0.{tensor}.weight");
        if header.tensor(&name).is_some_and(|tensor| tensor.shape.get(1) != Some(&rows)) {
            return Err(header.bad(format!("has a {name} that does not suit its {heads} and {length}")));
        }
    }
    Ok(())
}

fn check_bert(header: &Header) -> Result<(), Error> {
    check_heads(header)?;
    let Some(types) = header.tensor("token_types.weight") else { return Ok(()) };
    // llama.cpp adds a row of it to F32 and ends the process for any other type.
    let elements: u64 = types.shape.iter().product();
    if types.bytes != elements * 4 {
        return Err(header.bad("has a token_types.weight that is not F32"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sarai_support::gguf::{Damage, Kind, Model, TensorType};

    use super::*;

    fn message(model: &Model, damage: &Damage) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, model.damaged(damage).unwrap()).unwrap();
        let header = Header::read(&path).unwrap();
        check(&header).unwrap_err().to_string()
    }

    fn header(kind: Kind) -> Header {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        Model::new(kind).write_to(&path).unwrap();
        Header::read(&path).unwrap()
    }

    fn classifier() -> Kind {
        Kind::BertClassifier {
            labels: vec![("hard".into(), vec!["theorem".into()]), ("soft".into(), vec!["hello".into()])],
        }
    }

    #[test]
    fn what_would_end_the_process_is_refused_and_named() {
        let model = Model::new(Kind::Llama);
        assert!(message(&model, &Damage::DuplicateToken).contains("twice in tokenizer.ggml.tokens"));
        assert!(message(&model, &Damage::BlockCount(0)).contains("no usable llama.block_count"));
        assert!(message(&model, &Damage::BlockCount(40)).contains("no tensors of block 2"));
        assert!(message(&model, &Damage::BlockCount(9999)).contains("512 are the most"));
        assert!(
            message(&model, &Damage::MissingKey("general.architecture".into()))
                .contains("general.architecture")
        );
        assert!(
            message(&model, &Damage::MissingKey("tokenizer.ggml.tokens".into())).contains("no vocabulary")
        );
    }

    #[test]
    fn rotary_sections_of_zeros_and_dense_modules_of_another_width_are_refused_and_named() {
        let model = Model::new(Kind::Qwen2Vl);
        let key = "qwen2vl.rope.dimension_sections";
        let zeros = message(&model, &Damage::Zeros(key.into(), 4));
        assert!(zeros.ends_with(&format!("has only zeros in {key}")), "{zeros}");
        for (sections, said) in [
            (vec![0, 0, 0, 9], "has only zeros in"),
            (vec![4, -4, 0, 0], "has no usable"),
            (vec![16, 16, 1, 0], "has no usable"),
            (vec![i128::from(u64::MAX), 1, 0, 0], "has no usable"),
        ] {
            let mut header = header(Kind::Qwen2Vl);
            let numbers = sections.into_iter().map(|n: i128| Value::Int(n)).collect();
            header.values.insert(key.to_owned(), Value::Array(numbers));
            let refused = check(&header).unwrap_err().to_string();
            assert!(refused.contains(&format!("{said} {key}")), "{refused}");
        }
        let model = Model::new(Kind::GemmaEmbedding).dense(true);
        for key in ["dense_2_feat_in", "dense_3_feat_in", "dense_3_feat_out"] {
            let narrow = message(&model, &Damage::Number(format!("gemma-embedding.{key}"), 128));
            assert!(narrow.contains(&format!("has a {key} that differs")), "{narrow}");
        }
    }

    #[test]
    fn heads_that_are_not_turned_as_a_whole_are_refused_where_the_graph_asks_for_it() {
        let model = Model::new(Kind::Qwen2Vl);
        for key in ["qwen2vl.rope.dimension_count", "qwen2vl.attention.value_length"] {
            let refused = message(&model, &Damage::Number(key.into(), 16));
            assert!(refused.contains(&format!("has a {key} of 16, where its heads have 32")), "{refused}");
        }
    }

    #[test]
    fn every_synthetic_kind_passes() {
        for kind in
            [Kind::Llama, Kind::Lfm2, Kind::Qwen2Vl, Kind::BertEmbedding, Kind::GemmaEmbedding, classifier()]
        {
            check(&header(kind)).unwrap();
        }
    }

    #[test]
    fn a_model_that_cannot_do_what_is_wanted_is_refused() {
        assert!(suits(&header(Kind::BertEmbedding), Capability::Generate).is_err());
        assert!(suits(&header(Kind::BertEmbedding), Capability::Classify).is_err());
        assert!(suits(&header(Kind::Llama), Capability::Classify).is_err());
        assert!(suits(&header(Kind::Llama), Capability::Embed).is_ok());
        let classifier = header(classifier());
        assert!(suits(&classifier, Capability::Classify).is_ok());
        assert_eq!(labels(&classifier), ["hard", "soft"]);
        assert!(is_encoder(&classifier) && is_encoder(&header(Kind::GemmaEmbedding)));
    }

    #[test]
    fn keys_and_values_are_kept_in_whole_blocks() {
        let mut header = header(Kind::Llama);
        assert!(can_keep(&header, KvCacheType::Q8_0).is_ok());
        header.values.insert("llama.attention.value_length".to_owned(), Value::Int(40));
        assert!(can_keep(&header, KvCacheType::F16).is_ok());
        let refused = can_keep(&header, KvCacheType::Q8_0).unwrap_err().to_string();
        assert!(refused.contains("heads of 40 are no multiple of 32"), "{refused}");
    }

    #[test]
    fn keys_that_llama_cpp_would_stumble_over_are_refused() {
        let refusal = |kind: Kind, key: &str, value: Value| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            Model::new(kind).write_to(&path).unwrap();
            let mut header = Header::read(&path).unwrap();
            header.values.insert(key.to_owned(), value);
            check(&header).unwrap_err().to_string()
        };
        let text = |text: &str| Value::Text(text.to_owned());
        assert!(refusal(Kind::Llama, "tokenizer.ggml.model", text("none")).contains("no vocabulary"));
        let unknown = refusal(Kind::BertEmbedding, "bert.pooling_type", Value::Int(9));
        assert!(unknown.contains("unknown bert.pooling_type"), "{unknown}");
        let key = "tokenizer.ggml.seperator_token_id";
        let outside = refusal(Kind::BertEmbedding, key, Value::Int(1 << 20));
        assert!(outside.contains(key), "{outside}");
        let key = "llama.attention.layer_norm_rms_epsilon";
        let negative = refusal(Kind::Llama, key, Value::Float(-1e-5));
        assert!(negative.contains(key), "{negative}");
        let heads =
            refusal(Kind::GemmaEmbedding, "gemma-embedding.attention.head_count_kv", Value::Int(8193));
        assert!(heads.contains("blk.0.attn_k.weight"), "{heads}");
        let heads = refusal(Kind::BertEmbedding, "bert.attention.head_count_kv", Value::Int(3));
        assert!(heads.contains("blk.0.attn_k.weight"), "{heads}");
        let tokens = Value::Array(vec![text("a"), text("a\0b")]);
        let twice = refusal(Kind::Llama, "tokenizer.ggml.tokens", tokens);
        assert!(twice.contains("the token \"a\" twice"), "{twice}");
    }

    #[test]
    fn weights_of_integers_are_refused() {
        let mut header = header(Kind::Llama);
        let down = header.tensors.iter_mut().find(|tensor| tensor.name == "blk.1.ffn_down.weight").unwrap();
        down.kind = 24;
        let message = check(&header).unwrap_err().to_string();
        assert!(message.ends_with("type 24 in blk.1.ffn_down.weight"), "{message}");
    }

    #[test]
    fn bert_token_types_that_are_not_f32_are_refused() {
        let model = Model::new(Kind::BertEmbedding);
        let mut writer = model.writer().unwrap();
        writer.remove_tensor("token_types.weight");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        writer.push(sarai_support::gguf::Tensor::new(
            "token_types.weight",
            [256, 2],
            TensorType::F16,
            |_, row| row.fill(0.0),
        ));
        writer.create(&path).unwrap();
        assert!(check(&Header::read(&path).unwrap()).unwrap_err().to_string().contains("not F32"));
    }
}

//! The text models.

use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use sarai_support::gguf::{Kind, Model, Tensor, TensorType};

use crate::{context, load, load_bytes};

const PROMPT: &str = "<|im_start|>user\nHello, what's new?<|im_end|>\n<|im_start|>assistant\n";

/// What the model says, up to `limit` tokens, and whether it came to an end by itself.
fn say(model: &LlamaModel, prompt: &str, sampler: LlamaSampler, limit: usize) -> (String, bool) {
    let mut sampler = sampler;
    let vocab = model.vocab();
    let mut context = context(model, false);
    let prompt = vocab.tokenize(prompt.as_bytes(), true, true);
    let mut batch = LlamaBatch::new(512, 1);
    batch.add_sequence(&prompt, 0, false).unwrap();
    let mut said = Vec::new();
    for position in (prompt.len()..).take(limit) {
        context.decode(&mut batch).unwrap();
        let token = sampler.sample(&context, batch.n_tokens() - 1);
        if vocab.is_eog(token) {
            return (String::from_utf8(said).unwrap(), true);
        }
        said.extend(vocab.token_to_piece(token, false, None));
        batch.clear();
        batch.add(token, position as i32, &[0], true).unwrap();
    }
    (String::from_utf8(said).unwrap(), false)
}

fn greedy(model: &LlamaModel, prompt: &str) -> String {
    let (text, ended) = say(model, prompt, LlamaSampler::greedy(), 100);
    assert!(ended, "{text:?}");
    text
}

fn sampled(model: &LlamaModel, seed: u32, limit: usize) -> (String, bool) {
    let chain = [LlamaSampler::temp(0.8), LlamaSampler::dist(seed)];
    say(model, PROMPT, LlamaSampler::chain_simple(chain), limit)
}

/// Words separated by single spaces or signs.
fn is_readable(text: &str) -> bool {
    let plain = text.chars().all(|c| c.is_ascii_lowercase() || " ,.;!".contains(c));
    plain && !text.contains("  ") && !text.starts_with(' ') && text.split(' ').all(|word| word.len() > 2)
}

#[test]
fn text_models_say_words_and_come_to_an_end() {
    for kind in [Kind::Llama, Kind::Lfm2, Kind::Qwen2Vl] {
        for seed in 0..12 {
            let model = load(&Model::new(kind.clone()).seed(seed));
            let text = greedy(&model, PROMPT);
            assert!(is_readable(&text), "{kind:?} {seed}: {text:?}");
            assert!(text.split(' ').count() >= 16 && text.ends_with(['.', '!']), "{kind:?} {seed}: {text:?}");
        }
    }
}

#[test]
fn sampling_keeps_to_words_and_ends_now_and_then_after_half() {
    for kind in [Kind::Llama, Kind::Lfm2] {
        let model = load(&Model::new(kind.clone()));
        let said: Vec<_> = (0..24).map(|seed| sampled(&model, seed, 200)).collect();
        let readable = said.iter().filter(|(text, ended)| *ended && is_readable(text)).count();
        assert!(readable >= 22, "{kind:?}: {said:#?}");
        let half = said.iter().filter(|(text, _)| text.ends_with('.')).count();
        assert!((1..24).contains(&half), "{kind:?}: {half} {said:#?}");
    }
}

#[test]
fn a_model_says_what_it_was_told_to_and_ends() {
    let texts = ["I call", " it:\n", "<tool_call>", "{\"name\": \"ñ\"}", "</tool_call>"];
    for kind in [Kind::Llama, Kind::Lfm2, Kind::Qwen2Vl] {
        for seed in 0..4 {
            let model = load(&Model::new(kind.clone()).seed(seed).says(texts));
            assert_eq!(greedy(&model, PROMPT), texts.concat(), "{kind:?} {seed}");
        }
    }
}

#[test]
fn an_endless_model_goes_on() {
    for kind in [Kind::Llama, Kind::Lfm2] {
        let model = load(&Model::new(kind.clone()).endless(true));
        let (text, ended) = sampled(&model, 1, 400);
        assert!(!ended && text.lines().count() > 5, "{kind:?}: {text:?}");
    }
}

#[test]
fn another_seed_or_another_prompt_is_answered_otherwise() {
    for kind in [Kind::Llama, Kind::Lfm2] {
        let model = load(&Model::new(kind.clone()).seed(1));
        let again = load(&Model::new(kind.clone()).seed(1));
        let other = load(&Model::new(kind.clone()).seed(2));
        let text = greedy(&model, PROMPT);
        assert_eq!(text, greedy(&again, PROMPT));
        assert_ne!(text, greedy(&other, PROMPT));
        let prompt = PROMPT.replace("Hello, what's new?", "Háblame de los trenes que cruzan el norte.");
        assert_ne!(text, greedy(&model, &prompt), "{kind:?}");
    }
}

#[test]
fn every_text_comes_back_from_the_tokenizer() {
    let text =
        "¡Hola, qué tal!\n\tnaïve café – 日本語 한국어 🦀👩‍🚀 \u{0}\u{7f} quiet rivers  3.14 'll don't\r\n";
    for kind in [Kind::Llama, Kind::Lfm2, Kind::GemmaEmbedding] {
        let model = load(&Model::new(kind.clone()));
        let vocab = model.vocab();
        let tokens = vocab.tokenize(text.as_bytes(), false, false);
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| vocab.token_to_piece(*t, false, None)).collect();
        let back = String::from_utf8(bytes).unwrap();
        // SentencePiece puts a space before the first word.
        let back = if kind == Kind::GemmaEmbedding { back.strip_prefix(' ').unwrap() } else { &back };
        assert_eq!(back, text, "{kind:?}");
    }
}

#[test]
fn a_known_word_is_one_token_and_special_tokens_are_found() {
    for (kind, bos) in [(Kind::Llama, 0), (Kind::Lfm2, 1)] {
        let model = load(&Model::new(kind.clone()));
        let vocab = model.vocab();
        assert_eq!(vocab.tokenize(b"quiet rivers follow", true, true).len(), 3 + bos, "{kind:?}");
        let specials = vocab.tokenize(b"<|im_start|><|im_end|>", false, true);
        assert!(specials.len() == 2 && vocab.is_eog(specials[1]) && !vocab.is_eog(specials[0]), "{kind:?}");
        assert!(model.chat_template(None).unwrap().to_str().unwrap().contains("<|im_start|>"));
    }
}

#[test]
fn lfm2_is_a_hybrid_and_llama_is_not() {
    assert!(load(&Model::new(Kind::Lfm2)).is_hybrid());
    assert!(!load(&Model::new(Kind::Llama)).is_hybrid());
}

#[test]
fn every_type_of_weight_and_other_dimensions_run() {
    for weights in [
        TensorType::F32,
        TensorType::F16,
        TensorType::Q8_0,
        TensorType::Q4_0,
        TensorType::Q6_K,
        TensorType::Q4_K,
    ] {
        for kind in [Kind::Llama, Kind::Lfm2] {
            let model =
                Model::new(kind.clone()).weights(weights).n_embd(256).n_layer(3).n_head(8).n_head_kv(4);
            let model = load(&model.n_ff(512).n_vocab(4096).n_ctx_train(777));
            assert_eq!((model.n_vocab(), model.n_ctx_train(), model.n_layer()), (4096, 777, 3));
            let text = greedy(&model, PROMPT);
            assert!(is_readable(&text), "{kind:?} {weights:?}: {text:?}");
        }
    }
}

#[test]
fn random_blocks_load_and_give_finite_logits() {
    for weights in [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q6_K, TensorType::Q4_K] {
        let mut file = Model::new(Kind::Llama).n_embd(256).n_head(8).weights(weights).writer().unwrap();
        for name in ["blk.0.attn_v.weight", "blk.1.ffn_down.weight", "output.weight"] {
            let old = file.remove_tensor(name).unwrap();
            file.push(Tensor::random(name, old.shape(), weights, 1.0 / 16.0, 5));
        }
        let model = load_bytes(&file.to_bytes().unwrap()).unwrap();
        let mut context = context(&model, false);
        let prompt = model.vocab().tokenize(PROMPT.as_bytes(), true, true);
        let mut batch = LlamaBatch::new(512, 1);
        batch.add_sequence(&prompt, 0, false).unwrap();
        context.decode(&mut batch).unwrap();
        let logits = context.get_logits_ith(batch.n_tokens() - 1);
        assert!(logits.iter().all(|logit| logit.is_finite()), "{weights:?}");
        assert!(
            logits[..5].iter().all(|logit| *logit == 0.0) && logits.iter().any(|logit| *logit > 1.0),
            "{weights:?}"
        );
    }
}

//! The bert models.

use std::sync::Arc;

use super::error::Error;
use super::model::{Build, Model};
use super::random::Random;
use super::tensor::{Tensor, TensorType};
use super::vocab::{TokenKind, Vocab, WORD_START};
use super::words::STOP_WORDS;
use super::writer::Writer;

/// `llama_pooling_type`.
pub(crate) const MEAN: u32 = 1;
const RANK: u32 = 4;

/// An epsilon far above any variance here, and a weight that makes up for it, leave a norm nearly without effect: so
/// words keep the weights that their embeddings give them, where a usual norm would make all tokens count the same.
pub(crate) const EPSILON: f32 = 99.0;
pub(crate) const NORM: f32 = 10.0;

pub(crate) fn embedding(model: &Model) -> Result<Writer, Error> {
    let mut vocab = Vocab::word_piece(&[]);
    let mut build = Build::new(model, "bert", &mut vocab)?;
    build.key("pooling_type", MEAN);
    let (seed, weights) = (model.seed, importances(&vocab));
    build.rows("token_embd.weight", vocab.len(), move |id, row| {
        Random::new(seed, "token_embd.weight", id).add_noise(weights[id as usize], row);
    });
    body(&mut build, model, 0.2);
    Ok(build.writer)
}

/// One number of the state belongs to each label. A keyword's embedding sets its label's; everything else leaves
/// them alone, apart from the blocks' weak noise; the head reads them from the mean over the text.
pub(crate) fn classifier(model: &Model, labels: &[(String, Vec<String>)]) -> Result<Writer, Error> {
    /// Share of a keyword in its text at which the head is about to saturate: 1 in 10.
    const SIGNAL: f32 = 4.0;
    const HEAD: f32 = 3.0;
    const LOGIT: f32 = 6.0;

    let labels = checked(labels, model.n_embd)?;
    let n_labels = labels.len();
    let keywords: Vec<String> = labels.iter().flat_map(|(_, keywords)| keywords.clone()).collect();
    let mut vocab = Vocab::word_piece(&keywords);
    let mut build = Build::new(model, "bert", &mut vocab)?;
    build.key("pooling_type", RANK);
    build.key("classifier.pooling_type", MEAN);
    build.key("classifier.output_labels", labels.iter().map(|(label, _)| label.clone()).collect::<Vec<_>>());
    // Without it, reading the scores as an embedding reads past their end.
    build.key("embedding_length_out", n_labels as u32);

    let speaks_for = |text: &str, keywords: &[String]| {
        text.strip_prefix(WORD_START).is_some_and(|word| keywords.iter().any(|keyword| keyword == word))
    };
    let signs: Vec<Vec<usize>> = vocab
        .tokens
        .iter()
        .map(|token| {
            labels
                .iter()
                .enumerate()
                .filter(|(_, (_, k))| speaks_for(&token.text, k))
                .map(|(i, _)| i)
                .collect()
        })
        .collect();
    let (seed, weights, signs) = (model.seed, importances(&vocab), Arc::new(signs));
    build.rows("token_embd.weight", vocab.len(), move |id, row| {
        Random::new(seed, "token_embd.weight", id).add_noise(weights[id as usize], &mut row[n_labels..]);
        signs[id as usize].iter().for_each(|label| row[*label] = SIGNAL);
    });
    body(&mut build, model, 0.03);
    build.rows("cls.weight", model.n_embd as usize, move |i, row| {
        if (i as usize) < n_labels {
            row[i as usize] = HEAD;
        }
    });
    build.constant("cls.bias", model.n_embd, 0.0);
    build.rows("cls.output.weight", n_labels, |label, row| row[label as usize] = LOGIT);
    build.constant("cls.output.bias", n_labels as u32, 0.0);
    Ok(build.writer)
}

/// Positions, token types and blocks; the blocks' branches multiply by `gain`.
fn body(build: &mut Build<'_>, model: &Model, gain: f32) {
    let n = model.n_embd;
    build.key("attention.head_count_kv", model.n_head_kv);
    build.key("attention.layer_norm_epsilon", EPSILON);
    build.key("attention.causal", false);
    let seed = model.seed;
    let positions = [u64::from(n), u64::from(model.n_ctx_train)];
    build.writer.push(Tensor::new("position_embd.weight", positions, TensorType::F16, move |row, out| {
        Random::new(seed, "position_embd.weight", row).add_noise(0.02, out);
    }));
    // Added as it is, which ggml can do with F32 alone.
    build.writer.push(Tensor::new("token_types.weight", [u64::from(n), 2], TensorType::F32, |_, _| {}));
    norm(build, "token_embd_norm", n);
    let gain = gain / (model.n_layer as f32).sqrt();
    for i in 0..model.n_layer {
        let block = format!("blk.{i}");
        build.attention(&block, gain);
        norm(build, &format!("{block}.attn_output_norm"), n);
        build.matrix(&format!("{block}.ffn_up"), n, model.n_ff, 1.0);
        build.matrix(&format!("{block}.ffn_down"), model.n_ff, n, gain);
        norm(build, &format!("{block}.layer_output_norm"), n);
    }
}

fn norm(build: &mut Build<'_>, name: &str, n: u32) {
    build.constant(&format!("{name}.weight"), n, NORM);
    build.constant(&format!("{name}.bias"), n, 0.0);
}

/// The root mean square of each token's embedding: how much it says about a text. Pieces are so weighted that those of
/// an unknown word together count about as much as a known word.
pub(crate) fn importances(vocab: &Vocab) -> Vec<f32> {
    let is_stop_word = |word: &str| STOP_WORDS.split_whitespace().any(|stop| stop == word);
    let importance = |text: &str, kind| match kind {
        TokenKind::Control | TokenKind::Unused => 0.0,
        TokenKind::Unknown | TokenKind::Byte => 0.25,
        TokenKind::Normal => {
            let (letters, is_start) =
                text.strip_prefix(WORD_START).map_or((text, false), |word| (word, true));
            match letters.len() {
                _ if is_start && is_stop_word(letters) => 0.15,
                0 | 1 => 0.25,
                2 => 0.5,
                _ => 1.0,
            }
        }
    };
    vocab.tokens.iter().map(|token| importance(&token.text, token.kind)).collect()
}

type Labels = Vec<(String, Vec<String>)>;

/// The labels with their keywords as the tokenizer will see them.
fn checked(labels: &[(String, Vec<String>)], n_embd: u32) -> Result<Labels, Error> {
    if labels.is_empty() || labels.len() > n_embd as usize / 2 {
        return Err(Error::Setting { name: "labels", rule: format!("from 1 to {}", n_embd / 2) });
    }
    let refuse = |text: &str, rule| Err(Error::Label { text: text.to_owned(), rule });
    let mut out: Labels = Vec::new();
    for (label, keywords) in labels {
        if out.iter().any(|(known, _)| known == label) {
            return refuse(label, "every label once");
        }
        let mut plain = Vec::new();
        for keyword in keywords {
            let word: String = keyword.chars().map(without_accent).collect();
            if word.is_empty() || !word.bytes().all(|b| b.is_ascii_alphanumeric()) {
                return refuse(keyword, "one word of English or Spanish letters and digits");
            }
            plain.push(word);
        }
        out.push((label.clone(), plain));
    }
    Ok(out)
}

/// Lower case without accent, as the tokenizer makes a text; for the letters of English and Spanish.
fn without_accent(c: char) -> char {
    match c {
        'á' | 'Á' => 'a',
        'é' | 'É' => 'e',
        'í' | 'Í' => 'i',
        'ó' | 'Ó' => 'o',
        'ú' | 'Ú' | 'ü' | 'Ü' => 'u',
        'ñ' | 'Ñ' => 'n',
        _ => c.to_ascii_lowercase(),
    }
}

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use sarai_core::request::{Embeddings, LabelScore};

use super::generate::compute;
use crate::Error;

/// Embeds texts one after another; `None` as soon as nobody waits for them any more.
pub(super) fn embed(
    model: &LlamaModel,
    context: &mut LlamaContext<'_>,
    texts: &[String],
    must_end: &dyn Fn() -> bool,
) -> Result<Option<Embeddings>, Error> {
    let mut vectors = Vec::with_capacity(texts.len());
    let mut tokens = 0;
    for (index, text) in texts.iter().enumerate() {
        if must_end() {
            return Ok(None);
        }
        let (pooled, count) = pooled(model, context, text, index)?;
        vectors.push(pooled);
        tokens += count;
    }
    Ok(Some(Embeddings::normalised(vectors, u32::try_from(tokens).ok())))
}

/// Scores a text for the labels of the head, highest first: probabilities that sum to 1, or that of the only label.
pub(super) fn classify(
    model: &LlamaModel,
    context: &mut LlamaContext<'_>,
    text: &str,
    labels: &[String],
) -> Result<Vec<LabelScore>, Error> {
    let (logits, _) = pooled(model, context, text, 0)?;
    if logits.len() != labels.len() {
        let reason = format!("{} scores for {} labels", logits.len(), labels.len());
        return Err(Error::Compute { reason });
    }
    let scores = probabilities(&logits);
    let mut scored: Vec<LabelScore> =
        labels.iter().zip(scores).map(|(label, score)| LabelScore { label: label.clone(), score }).collect();
    scored.sort_by(|a, b| b.score.total_cmp(&a.score));
    Ok(scored)
}

/// The model's one result for a whole text, and the text's tokens.
fn pooled(
    model: &LlamaModel,
    context: &mut LlamaContext<'_>,
    text: &str,
    index: usize,
) -> Result<(Vec<f32>, usize), Error> {
    let tokens = model.vocab().tokenize(text.as_bytes(), true, false);
    // llama.cpp makes the context a little longer than asked; its batch, which has to take the whole text, is not.
    let n_ctx = context.n_ctx().min(context.n_batch());
    if tokens.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    if tokens.len() > n_ctx as usize {
        return Err(Error::TextTooLong { index, tokens: tokens.len(), n_ctx });
    }
    context.clear_kv_cache();
    let mut batch = LlamaBatch::new(tokens.len(), 1);
    for (at, token) in tokens.iter().enumerate() {
        batch.add(*token, at as i32, &[0], true).map_err(compute)?;
    }
    context.decode(&mut batch).map_err(compute)?;
    let pooled = context.embeddings_seq_ith(0).map_err(compute)?;
    Ok((pooled.to_vec(), tokens.len()))
}

/// Softmax over several labels, the logistic function for a single one.
fn probabilities(logits: &[f32]) -> Vec<f32> {
    if let [only] = logits {
        return vec![1.0 / (1.0 + (-only).exp())];
    }
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_keep_their_order_for_any_size() {
        let all = probabilities(&[1000.0, 999.0, -1000.0]);
        assert!((all.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(all[0] > all[1] && all[1] > all[2]);
        assert_eq!(probabilities(&[0.0]), [0.5]);
    }
}

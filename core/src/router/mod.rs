//! Finds the model for a text: by the likeness of its embedding to examples, or by a classifier.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio::sync::OnceCell;

use crate::answer::{CallOptions, Models, Provenance};
use crate::config::{RouterConfig, RouterKind};
use crate::error::Error;
use crate::request::LabelScore;
use crate::units::ModelName;

/// Scores texts by label and picks a model by rule.
#[derive(Debug)]
pub struct Router {
    config: RouterConfig,
    /// The examples' vectors by label, embedded on first use. A failure is not kept.
    examples: OnceCell<BTreeMap<String, Vec<Vec<f32>>>>,
}

/// Where a text should go, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Routing {
    /// The label that won; `None` if none reached the threshold.
    pub label: Option<String>,
    /// The model; `None` if neither the label nor the default gives one.
    pub model: Option<ModelName>,
    /// All labels, highest score first, equal ones by name. From 0 to 1.
    pub scores: Vec<LabelScore>,
    /// Why this model, with the numbers.
    pub reason: String,
    /// Who scored the text.
    #[serde(flatten)]
    pub provenance: Provenance,
}

impl Router {
    /// A router. Nothing is asked yet.
    #[must_use]
    pub fn new(config: RouterConfig) -> Self {
        Self { config, examples: OnceCell::new() }
    }

    /// Finds the model for a text.
    ///
    /// # Errors
    /// The model that scores cannot answer.
    ///
    /// # Cancel safety
    /// Cancel safe: whoever asks next embeds the examples, if that was not done.
    pub async fn route(
        &self,
        text: &str,
        models: &dyn Models,
        options: CallOptions,
    ) -> Result<Routing, Error> {
        let (mut scores, provenance) = match &self.config.kind {
            RouterKind::Similarity { model, labels } => {
                let examples =
                    self.examples.get_or_try_init(|| embed_examples(model, labels, models, options)).await?;
                let (embedded, provenance) = models.embed(model, vec![text.to_owned()], options).await?;
                let vector = embedded.vectors.first().map_or(&[][..], Vec::as_slice);
                (likeness(vector, examples), provenance)
            }
            RouterKind::Classifier { model } => models.classify(model, text.to_owned(), options).await?,
        };
        scores.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| a.label.cmp(&b.label)));
        let label =
            scores.first().filter(|best| best.score >= self.config.threshold).map(|best| best.label.clone());
        let by_label = label.as_ref().and_then(|label| self.config.routes.get(label));
        let model = by_label.or(self.config.default.as_ref()).cloned();
        let reason = self.reason(&scores, label.as_deref(), by_label.is_some(), model.as_ref());
        Ok(Routing { label, model, scores, reason, provenance })
    }

    fn reason(
        &self,
        scores: &[LabelScore],
        label: Option<&str>,
        routed: bool,
        model: Option<&ModelName>,
    ) -> String {
        let shown = |score: &LabelScore| format!("{} {:.2}", score.label, score.score);
        let won = match (scores, label) {
            ([best, second, ..], Some(_)) => format!("{} above {}", shown(best), shown(second)),
            ([best, ..], Some(_)) => shown(best),
            ([best, ..], None) => {
                format!("{} is below the threshold of {:.2}", shown(best), self.config.threshold)
            }
            ([], _) => "no label was scored".to_owned(),
        };
        match (model, label) {
            (Some(model), Some(label)) if routed => format!("{won}; {label} goes to {model}"),
            (Some(model), _) => format!("{won}; the default is {model}"),
            (None, _) => format!("{won}; no route and no default gives a model"),
        }
    }
}

async fn embed_examples(
    model: &ModelName,
    labels: &BTreeMap<String, Vec<String>>,
    models: &dyn Models,
    options: CallOptions,
) -> Result<BTreeMap<String, Vec<Vec<f32>>>, Error> {
    let texts: Vec<String> = labels.values().flatten().cloned().collect();
    let (embedded, _) = models.embed(model, texts, options).await?;
    let mut vectors = embedded.vectors.into_iter();
    Ok(labels
        .iter()
        .map(|(label, texts)| (label.clone(), vectors.by_ref().take(texts.len()).collect()))
        .collect())
}

/// A label's score is the cosine to the likeliest of its examples; what points the other way counts as zero.
fn likeness(vector: &[f32], examples: &BTreeMap<String, Vec<Vec<f32>>>) -> Vec<LabelScore> {
    // Vectors have length 1: their dot product is the cosine.
    let cosine = |other: &Vec<f32>| vector.iter().zip(other).map(|(a, b)| a * b).sum::<f32>();
    let best = |vectors: &Vec<Vec<f32>>| vectors.iter().map(cosine).fold(0.0, f32::max);
    examples
        .iter()
        .map(|(label, vectors)| LabelScore { label: label.clone(), score: best(vectors).min(1.0) })
        .collect()
}

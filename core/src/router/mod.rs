//! Finds the model for a text: by the likeness of its embedding to examples, or by a classifier. A text may have high scores for
//! several labels; rules over all of them go before the label that wins.

mod condition;
mod hints;

pub(crate) use condition::Condition;
pub use hints::Hints;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::Mutex;

use crate::answer::{CallOptions, Models, Provenance};
use crate::backend::ServedBy;
use crate::config::{RouterConfig, RouterKind, RouterRule};
use crate::error::Error;
use crate::request::LabelScore;
use crate::units::ModelName;

/// Scores texts by label and picks a model by rule.
#[derive(Debug)]
pub struct Router {
    config: RouterConfig,
    /// Those of the configuration's rules, compiled.
    rules: Vec<Rule>,
    /// Embedded on first use. A failure is not kept.
    examples: Mutex<Option<Arc<Examples>>>,
}

/// A rule's condition; where it is none, why.
#[derive(Debug)]
struct Rule {
    condition: Result<Condition, String>,
    when: String,
    model: ModelName,
}

/// The examples' vectors by label. Only vectors of one place can be compared: another model means something else by
/// the same numbers.
#[derive(Debug)]
struct Examples {
    served_by: ServedBy,
    vectors: BTreeMap<String, Vec<Vec<f32>>>,
}

/// Where a text should go, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Routing {
    /// The label that won; `None` if none reached the threshold.
    pub label: Option<String>,
    /// The rule that held, where one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The model; `None` if no rule held, and neither the label nor the default gives one.
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
        let rule = |rule: &RouterRule| Rule {
            condition: Condition::new(&rule.when, None),
            when: rule.when.clone(),
            model: rule.model.clone(),
        };
        let rules = config.rules.iter().map(rule).collect();
        Self { config, rules, examples: Mutex::new(None) }
    }

    /// Finds the model for a text.
    ///
    /// # Errors
    /// The model that scores cannot answer, or a rule asks for a label that it does not score.
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
                let (vector, examples, provenance) =
                    self.compare(text, model, labels, models, options).await?;
                (likeness(&vector, &examples.vectors), provenance)
            }
            RouterKind::Classifier { model } => models.classify(model, text.to_owned(), options).await?,
        };
        scores.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| a.label.cmp(&b.label)));
        let label =
            scores.first().filter(|best| best.score >= self.config.threshold).map(|best| best.label.clone());
        if let Some(Rule { when, model, .. }) = self.holding(&scores)? {
            let shown: Vec<String> = scores.iter().map(shown).collect();
            let reason = format!("{}; `{when}` goes to {model}", shown.join(", "));
            let (rule, model) = (Some(when.clone()), Some(model.clone()));
            return Ok(Routing { label, rule, model, scores, reason, provenance });
        }
        let by_label = label.as_ref().and_then(|label| self.config.routes.get(label));
        let model = by_label.or(self.config.default.as_ref()).cloned();
        let reason = self.reason(&scores, label.as_deref(), by_label.is_some(), model.as_ref());
        Ok(Routing { label, rule: None, model, scores, reason, provenance })
    }

    /// The first rule that holds.
    fn holding(&self, scores: &[LabelScore]) -> Result<Option<&Rule>, Error> {
        for rule in &self.rules {
            let holds = rule.condition.as_ref().map_err(String::clone).and_then(|rule| rule.holds(scores));
            let bad = |message| Error::NoRoute { message: format!("the rule `{}`: {message}", rule.when) };
            if holds.map_err(bad)? {
                return Ok(Some(rule));
            }
        }
        Ok(None)
    }

    /// The text's vector and the examples', from the same place.
    async fn compare(
        &self,
        text: &str,
        model: &ModelName,
        labels: &BTreeMap<String, Vec<String>>,
        models: &dyn Models,
        options: CallOptions,
    ) -> Result<(Vec<f32>, Arc<Examples>, Provenance), Error> {
        loop {
            let known = self.examples.lock().await.clone();
            if let Some(examples) = &known {
                let (embedded, provenance) = models.embed(model, vec![text.to_owned()], options).await?;
                if provenance.served_by == examples.served_by {
                    let vector = embedded.vectors.into_iter().next().unwrap_or_default();
                    return Ok((vector, Arc::clone(examples), provenance));
                }
            }
            // Held meanwhile: whoever else needs the examples waits for these.
            let mut kept = self.examples.lock().await;
            if kept.as_ref().map(Arc::as_ptr) != known.as_ref().map(Arc::as_ptr) {
                continue;
            }
            // One request, so that one place answers it.
            let texts = [text].into_iter().chain(labels.values().flatten().map(String::as_str));
            let texts = texts.map(str::to_owned).collect();
            let (embedded, provenance) = models.embed(model, texts, options).await?;
            let mut vectors = embedded.vectors.into_iter();
            let vector = vectors.next().unwrap_or_default();
            let by_label = |(label, texts): (&String, &Vec<String>)| {
                (label.clone(), vectors.by_ref().take(texts.len()).collect())
            };
            let vectors = labels.iter().map(by_label).collect();
            let examples = Arc::new(Examples { served_by: provenance.served_by.clone(), vectors });
            *kept = Some(Arc::clone(&examples));
            return Ok((vector, examples, provenance));
        }
    }

    fn reason(
        &self,
        scores: &[LabelScore],
        label: Option<&str>,
        routed: bool,
        model: Option<&ModelName>,
    ) -> String {
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

fn shown(score: &LabelScore) -> String {
    format!("{} {:.2}", score.label, score.score)
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

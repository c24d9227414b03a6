//! A rule's condition on a text's scores.

use std::collections::BTreeMap;

use minijinja::value::Value;
use minijinja::{Environment, UndefinedBehavior};

use crate::nearest::nearest;
use crate::request::LabelScore;

/// Steps that a condition may take.
const FUEL: u64 = 10_000;
/// The condition's name among the templates.
const NAME: &str = "when";

/// An expression over the scores of labels, by their names or in `scores`.
#[derive(Debug)]
pub(crate) struct Condition(Environment<'static>);

impl Condition {
    /// Reads a condition; with the labels that there are, also whether it asks for others.
    pub(crate) fn new(when: &str, labels: Option<&[&str]>) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(FUEL));
        environment.compile_expression_owned(when.to_owned()).map(drop).map_err(|error| said(&error))?;
        let template = format!("{{% if {when} %}}true{{% endif %}}");
        environment.add_template_owned(NAME, template).map_err(|error| said(&error))?;
        let template = environment.get_template(NAME).map_err(|error| said(&error))?;
        for name in template.undeclared_variables(false) {
            let is_function = environment.globals().any(|(own, _)| own == name);
            let Some(labels) = labels.filter(|_| !is_function && name != "scores") else { continue };
            if !labels.contains(&name.as_str()) {
                let near = nearest(&name, labels.iter().copied());
                let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
                return Err(format!("`{name}` is not among the labels{near}"));
            }
        }
        Ok(Self(environment))
    }

    /// Whether it holds for these scores.
    pub(crate) fn holds(&self, scores: &[LabelScore]) -> Result<bool, String> {
        let all: BTreeMap<&str, f64> =
            scores.iter().map(|score| (score.label.as_str(), as_written(score.score))).collect();
        let mut names: BTreeMap<&str, Value> =
            all.iter().map(|(label, score)| (*label, Value::from(*score))).collect();
        names.insert("scores", Value::from_pairs(all));
        let rendered =
            self.0.get_template(NAME).and_then(|template| template.render(Value::from_pairs(names)));
        rendered.map(|rendered| !rendered.is_empty()).map_err(|error| said(&error))
    }
}

/// The score as a rule's author would write it: the number of single precision for 0.7 is a little less than the double one.
fn as_written(score: f32) -> f64 {
    // What a number is written as can be read.
    score.to_string().parse().unwrap_or_else(|_| f64::from(score))
}

fn said(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores() -> Vec<LabelScore> {
        let score = |(label, score): (&str, f32)| LabelScore { label: label.to_owned(), score };
        [("hard", 0.8), ("soft", 0.6), ("two words", 0.1)].map(score).to_vec()
    }

    #[test]
    fn several_labels_may_count_together() {
        let holds = |when: &str| Condition::new(when, None).unwrap().holds(&scores());
        assert_eq!(holds("hard >= 0.5 and soft >= 0.5"), Ok(true));
        assert_eq!(holds("hard > soft + 0.3"), Ok(false));
        assert_eq!(holds("hard >= 0.8 and hard <= 0.8 and soft == 0.6"), Ok(true), "exactly as written");
        assert_eq!(holds("scores[\"two words\"] < 0.2"), Ok(true));
        assert!(holds("musical > 0.1").unwrap_err().contains("undefined"));
    }

    #[test]
    fn what_is_no_condition_or_asks_for_no_label_is_said() {
        let refused = |when: &str| Condition::new(when, Some(&["hard", "soft"])).map(drop).unwrap_err();
        assert!(refused("hard >=").contains("syntax error"));
        assert_eq!(refused("sotf > 0.5"), "`sotf` is not among the labels, did you mean `soft`?");
        assert!(Condition::new("scores.hard > 0.5 and hard < soft", Some(&["hard", "soft"])).is_ok());
    }
}

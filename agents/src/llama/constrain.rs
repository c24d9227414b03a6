//! Answers that have to have a form: which tokens may come next. JSON schemas are worked out by llguidance, GBNF by
//! llama.cpp.

use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use sarai_core::request::Constraint;
use serde_json::{Value, json};

use super::grammar;
use super::load::Loaded;
use crate::Error;

/// The form of an answer, as far as it has come.
pub(super) enum Form {
    Schema(Box<Matcher>),
    Grammar(LlamaSampler),
}

impl Form {
    pub(super) fn new(constraint: &Constraint, loaded: &Loaded) -> Result<Self, Error> {
        match constraint {
            Constraint::JsonSchema(schema) => {
                let grammar = TopLevelGrammar::from_json_schema(with_few_blanks(schema.clone()));
                let matcher = Matcher::new(loaded.schemas()?.create_parser(grammar));
                match matcher.get_error() {
                    Some(reason) => Err(Error::BadSchema { reason }),
                    None => Ok(Self::Schema(Box::new(matcher))),
                }
            }
            Constraint::Grammar(text) => {
                let vocab = loaded.model().vocab();
                let is_token = |text: &str| vocab.tokenize(text.as_bytes(), false, true).len() == 1;
                grammar::check(text, &is_token).map_err(|reason| Error::BadGrammar { reason })?;
                let grammar = LlamaSampler::grammar(loaded.model(), text, "root");
                grammar.map(Self::Grammar).map_err(|error| Error::BadGrammar { reason: error.to_string() })
            }
        }
    }

    /// The form of an answer that has begun so. Its tokens are cut here, which may not be how they were when it was written:
    /// only the text counts.
    pub(super) fn after(constraint: &Constraint, said: &str, loaded: &Loaded) -> Result<Self, Error> {
        let mut form = Self::new(constraint, loaded)?;
        if !said.is_empty() {
            // Not by the vocabulary's own rules, which may put a blank before the first word.
            let tokens = loaded.schemas()?.tok_env().tok_trie().greedy_tokenize(said.as_bytes());
            for token in tokens {
                form.goes_on_by(LlamaToken(token.cast_signed()))?;
            }
        }
        Ok(form)
    }

    /// Goes on by a token that somebody else has chosen.
    fn goes_on_by(&mut self, token: LlamaToken) -> Result<(), Error> {
        let allowed = match self {
            // It says so itself.
            Self::Schema(_) => true,
            Self::Grammar(sampler) => {
                let mut candidates =
                    LlamaTokenDataArray::new(vec![LlamaTokenData::new(token, 0.0, 0.0)], false);
                sampler.apply(&mut candidates);
                candidates.data.iter().all(|candidate| candidate.logit() > f32::NEG_INFINITY)
            }
        };
        if !allowed {
            return Err(stuck(&"it has begun in another form"));
        }
        self.accept(token)
    }

    /// Gives every token that may not come next the score of minus infinity.
    pub(super) fn mask(&mut self, candidates: &mut LlamaTokenDataArray) -> Result<(), Error> {
        match self {
            Self::Schema(matcher) => {
                let allowed = matcher.compute_mask_or_eos().map_err(|error| stuck(&error))?;
                for candidate in &mut candidates.data {
                    if !allowed.is_allowed(candidate.id().0.cast_unsigned()) {
                        candidate.set_logit(f32::NEG_INFINITY);
                    }
                }
            }
            Self::Grammar(sampler) => sampler.apply(candidates),
        }
        // llama.cpp ends the process when its grammar is given a token that it does not allow.
        if candidates.data.iter().all(|candidate| candidate.logit() == f32::NEG_INFINITY) {
            return Err(stuck(&"the vocabulary has no token that may come next"));
        }
        Ok(())
    }

    /// Goes on by a token that was allowed, and does not end the answer.
    pub(super) fn accept(&mut self, token: LlamaToken) -> Result<(), Error> {
        match self {
            Self::Schema(matcher) => {
                matcher.consume_token(token.0.cast_unsigned()).map_err(|error| stuck(&error))
            }
            Self::Grammar(sampler) => {
                sampler.accept(token);
                Ok(())
            }
        }
    }
}

impl std::fmt::Debug for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Schema(_) => "Schema",
            Self::Grammar(_) => "Grammar",
        })
    }
}

/// JSON allows any number of blanks and line breaks, with which a model may go on until its context ends.
fn with_few_blanks(mut schema: Value) -> Value {
    if let Value::Object(keys) = &mut schema {
        let options = || json!({ "whitespace_pattern": r" |\n[ \t]{0,16}" });
        keys.entry("x-guidance").or_insert_with(options);
    }
    schema
}

fn stuck(reason: &dyn std::fmt::Display) -> Error {
    Error::Constraint { reason: reason.to_string() }
}

//! What a person has typed or said so far, as a hint at the model that will be asked.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::Router;
use crate::answer::{CallOptions, Models, Priority};
use crate::units::ModelName;

/// How long a text has to stay as it is before it is looked at: somebody who types pauses for longer between thoughts, and for less
/// between letters.
const DEBOUNCE: Duration = Duration::from_millis(300);

/// Makes the model ready that a text in the making will probably go to. Nothing is evicted for it that was used within the last
/// minute. Ends with its last clone.
#[derive(Clone, Debug)]
pub struct Hints {
    texts: watch::Sender<String>,
    _task: Arc<Ended>,
}

#[derive(Debug)]
struct Ended(AbortHandle);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Hints {
    /// Listens for hints from now on. Needs a tokio runtime around it.
    #[must_use]
    pub fn new(router: Arc<Router>, models: Arc<dyn Models>) -> Self {
        let (texts, heard) = watch::channel(String::new());
        let task = tokio::spawn(listen(heard, router, models));
        Self { texts, _task: Arc::new(Ended(task.abort_handle())) }
    }

    /// The text as it is so far. Returns at once; the latest one counts.
    pub fn hint(&self, text: &str) {
        self.texts.send_replace(text.trim().to_owned());
    }
}

async fn listen(mut texts: watch::Receiver<String>, router: Arc<Router>, models: Arc<dyn Models>) {
    let options = CallOptions { priority: Priority::Background, ..CallOptions::default() };
    let mut ready: Option<ModelName> = None;
    while texts.changed().await.is_ok() {
        // Every further text begins the time anew.
        while let Ok(changed) = tokio::time::timeout(DEBOUNCE, texts.changed()).await {
            if changed.is_err() {
                return;
            }
        }
        let text = texts.borrow_and_update().clone();
        if text.is_empty() {
            continue;
        }
        match router.route(&text, &*models, options).await {
            Ok(routing) => {
                if let Some(model) = routing.model.filter(|model| ready.as_ref() != Some(model)) {
                    models.prepare(&model).await;
                    ready = Some(model);
                }
            }
            Err(error) => tracing::debug!(%error, "a hint leads nowhere"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::{RouterConfig, RouterKind};
    use crate::testing::{FakeModels, Script};

    fn hints(models: &FakeModels) -> Hints {
        let labels = [("hard", "theorem"), ("soft", "hello")];
        let config = RouterConfig {
            kind: RouterKind::Similarity {
                model: "e".parse().unwrap(),
                labels: labels.map(|(label, text)| (label.to_owned(), vec![text.to_owned()])).into(),
            },
            rules: Vec::new(),
            routes: BTreeMap::from([
                ("hard".to_owned(), "a".parse().unwrap()),
                ("soft".to_owned(), "b".parse().unwrap()),
            ]),
            default: None,
            threshold: 0.1,
        };
        Hints::new(Arc::new(Router::new(config)), Arc::new(models.clone()))
    }

    fn models() -> FakeModels {
        FakeModels::default().with("e", Script::CountsWords(vec!["theorem".to_owned(), "hello".to_owned()]))
    }

    async fn pass(milliseconds: u64) {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_text_counts_once_it_has_stayed_for_a_while() {
        let models = models();
        let hints = hints(&models);
        for text in ["he", "hello", "hello, prove", "prove the theorem"] {
            hints.hint(text);
            pass(200).await;
            assert!(models.asked().is_empty(), "{text}");
        }
        pass(200).await;
        assert_eq!(models.prepared(), ["a"]);
        assert_eq!(models.asked().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_is_ready_is_not_made_ready_again_and_nothing_leads_nowhere() {
        let models = models();
        let hints = hints(&models);
        for text in ["the theorem", "  ", "this theorem", "what?", "hello"] {
            hints.hint(text);
            pass(400).await;
        }
        assert_eq!(models.prepared(), ["a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_router_that_fails_harms_nobody_and_a_hint_ends_with_its_owner() {
        let failing = FakeModels::default().with("e", Script::Fails);
        let hints = hints(&failing);
        hints.hint("the theorem");
        pass(400).await;
        assert!(failing.prepared().is_empty());
        hints.hint("again");
        drop(hints);
        pass(1000).await;
        assert_eq!(failing.asked().len(), 1, "only what was asked before");
    }
}

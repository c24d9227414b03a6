use std::collections::BTreeMap;

use futures::StreamExt;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use sarai::core::scheduler::Phase;
use sarai::{ModelPool, PoolEvent};

/// Shows the pool's loads as bars on stderr, until the pool ends.
pub(super) fn show(pool: &ModelPool) {
    let mut events = pool.events();
    tokio::spawn(async move {
        let (bars, mut shown) = (MultiProgress::new(), BTreeMap::<String, ProgressBar>::new());
        while let Some(event) = events.next().await {
            match event {
                PoolEvent::LoadProgress { model, percent } => {
                    let bar = shown.entry(model.to_string()).or_insert_with(|| bars.add(bar(model.as_str())));
                    bar.set_position(percent.into());
                }
                PoolEvent::Slot(change) if change.from == Phase::Loading => {
                    if let Some(bar) = shown.remove(change.model.as_str()) {
                        bar.finish_and_clear();
                    }
                }
                _ => {}
            }
        }
    });
}

fn bar(model: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("loading {msg} {bar:30} {percent}%");
    ProgressBar::new(100)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(model.to_owned())
}

//! How a file's weights are held: mapped as they are, or as a copy that is repacked for this CPU. Which is faster depends
//! on the model, the machine and what is asked of it, so for a resident model that leaves it open both are tried, once.

use std::time::{Duration, Instant};

use llama_cpp_2::token::LlamaToken;
use sarai_core::backend::LoadRequest;
use sarai_core::config::Weights;
use sarai_core::request::Capability;

use super::context::{Batch, Context, Step, compute};
use super::header::Header;
use super::load::Loaded;
use super::record::{self, Record};
use super::{GgufSettings, estimate, measure};
use crate::Error;

/// The file's name in the folder of measurements.
const NAME: &str = "weights.json";
/// Tokens of a text, and of an answer, that are timed; the best of several runs counts.
const TEXT: usize = 64;
const ANSWER: usize = 8;
const RUNS: usize = 3;

/// Whether weights are to be repacked; `None` where that has to be measured first.
pub(super) fn repacked(settings: &GgufSettings) -> Option<bool> {
    match settings.weights {
        Weights::Mmap => Some(false),
        Weights::Repack => Some(true),
        Weights::Auto if !settings.resident => Some(false),
        // Nobody would remember what was measured.
        Weights::Auto => match Record::of(settings, NAME) {
            Some(record) => record.get(&record::key(settings)),
            None => Some(false),
        },
    }
}

/// Loads the file in both ways and measures what the model is there for. Returns whether repacked weights are faster, and
/// remembers it.
pub(super) fn find_faster(
    settings: &GgufSettings,
    header: &Header,
    request: &LoadRequest,
) -> Result<bool, Error> {
    let mapped = time(settings, header, request, false)?;
    let repacked = time(settings, header, request, true)?;
    // What the load itself takes is measured next, and must not come out of what is left of these.
    measure::trim();
    let faster = repacked < mapped;
    tracing::info!(path = %settings.path.display(), ?mapped, ?repacked, "the faster way to hold the weights was measured");
    if let Some(record) = Record::of(settings, NAME) {
        record.put(record::key(settings), faster);
    }
    Ok(faster)
}

fn time(
    settings: &GgufSettings,
    header: &Header,
    request: &LoadRequest,
    repacked: bool,
) -> Result<Duration, Error> {
    let (loaded, _) = Loaded::load(settings, repacked, request)?;
    let n_ctx = TEXT as u32 + ANSWER as u32;
    let shape = estimate::shape(header, settings, n_ctx);
    let failed = || Error::ContextFailed { path: settings.path.clone(), n_ctx };
    let mut context = Context::new(&loaded, &shape).ok_or_else(failed)?;
    let n_vocab = loaded.model().vocab().n_tokens().max(1);
    let stops = || request.cancel.is_cancelled();
    let mut best = None;
    for _ in 0..RUNS {
        let cancelled = || Error::LoadCancelled { path: settings.path.clone() };
        let took = work(&mut context, settings.purpose, n_vocab, &stops)?.ok_or_else(cancelled)?;
        best = Some(best.map_or(took, |best: Duration| best.min(took)));
    }
    best.ok_or_else(|| compute("nothing was measured"))
}

/// Reads a text; of a model that generates, only the answer after it is timed. `None` where it was stopped.
fn work(
    context: &mut Context<'_>,
    purpose: Capability,
    n_vocab: i32,
    stops: &dyn Fn() -> bool,
) -> Result<Option<Duration>, Error> {
    let mut batch = Batch::default();
    let generates = purpose == Capability::Generate;
    let started = Instant::now();
    for position in 0..TEXT {
        // A model that generates has room for a few outputs only.
        let output = !generates || position + 1 == TEXT;
        batch.push(LlamaToken(position as i32 % n_vocab), position, 0, output);
    }
    if context.decode(&batch, stops)? == Step::Stopped {
        return Ok(None);
    }
    let mut took = started.elapsed();
    if generates {
        let started = Instant::now();
        for position in TEXT..TEXT + ANSWER {
            batch.clear();
            batch.push(LlamaToken(0), position, 0, true);
            if context.decode(&batch, stops)? == Step::Stopped {
                return Ok(None);
            }
        }
        took = started.elapsed();
    }
    context.forget(0);
    Ok(Some(took))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use sarai_core::memory::Estimate;
    use sarai_support::gguf::{Kind, Model};
    use tokio_util::sync::CancellationToken;

    use super::*;

    #[test]
    fn a_load_that_is_cancelled_while_it_measures_ends_within_a_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        Model::new(Kind::Llama).write_to(&path).unwrap();
        let settings = GgufSettings::new(&path, Capability::Generate);
        let header = Header::read(&path).unwrap();
        let cancel = CancellationToken::new();
        let request = LoadRequest { cancel: cancel.clone(), ..LoadRequest::new(Estimate::default()) };
        let (loaded, _) = Loaded::load(&settings, false, &request).unwrap();
        let mut context = Context::new(&loaded, &estimate::shape(&header, &settings, 80)).unwrap();
        let asked = AtomicBool::new(false);
        let stops = || asked.swap(true, Ordering::Relaxed);
        assert_eq!(work(&mut context, Capability::Generate, 100, &stops).unwrap(), None);
        assert!(work(&mut context, Capability::Generate, 100, &|| false).unwrap().is_some());
    }
}

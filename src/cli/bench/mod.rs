//! Several models at once: what it takes, what it gains, and whether the budget holds.

mod made;
mod watch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use comfy_table::Table;
use futures::StreamExt;
use sarai::core::Holder;
use sarai::core::backend::ServedBy;
use sarai::core::config::{Class, Config, ModelConfig, Place, Resolved};
use sarai::{
    Answer, AnswerEvent, Bytes, CallOptions, Capability, Error, GenerateRequest, Image, MemoryUsage, Message,
    ModelMemory, ModelName, ModelPool, ModelRole, Sampling,
};
use serde::Serialize;

use super::args::{Common, ConcurrentArgs, ShapeArg};
use super::exit::Failure;
use super::files;
use super::output::Output;
use super::ps::shorten;
use super::session::{Session, find, read, read_made};
use super::table::table;
use made::Made;
use watch::Watch;

/// What is shown to models that see, where no image is named.
const PICTURE: &[u8] = include_bytes!("../../../config/demo/picture.png");
/// What there is to do where the installation lacks something.
const OR_MADE: &str = "or measure with models that are made for it: --shape tiny or --shape full";

/// What came of it.
#[derive(Serialize)]
struct Report {
    /// The installation's own configuration, or the made models.
    config: Option<PathBuf>,
    shape: Option<ShapeArg>,
    runs: usize,
    tokens: u32,
    models: Vec<Row>,
    one_after_another: Total,
    at_once: Total,
    /// How many times as many tokens a second all together give as one after another.
    ratio: Option<f64>,
    budget_bytes: Bytes,
    /// The most that was measured, since before the first load.
    peak_bytes: Bytes,
    /// The most that the ledger held.
    reserved_peak_bytes: Bytes,
    /// Who had to leave during the runs, and why.
    evictions: Vec<String>,
    /// How requests failed during the runs.
    failed: Vec<String>,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Row {
    model: String,
    /// Who answered last; none where nobody did.
    served_by: Option<String>,
    fallback_reason: Option<String>,
    n_ctx: Option<u32>,
    saw_image: bool,
    alone: Speed,
    at_once: Speed,
    reserved_bytes: Option<Bytes>,
    measured_bytes: Option<Bytes>,
}

/// Medians over the runs; none where no request was answered.
#[derive(Serialize)]
struct Speed {
    first_token_ms: Option<f64>,
    tokens_per_second: Option<f64>,
}

/// All answers of all runs.
#[derive(Serialize)]
struct Total {
    tokens: u64,
    seconds: f64,
    /// The median over the runs.
    tokens_per_second: Option<f64>,
}

#[derive(Serialize)]
struct Check {
    what: &'static str,
    holds: bool,
    /// Whether the bench fails where it does not hold.
    counts: bool,
    found: String,
}

pub(super) async fn concurrent(
    common: &Common,
    args: &ConcurrentArgs,
    output: &Output,
) -> Result<(), Failure> {
    let image = match &args.image {
        Some(path) => files::image(path).await?,
        None => Image::new(PICTURE).map_err(|error| Failure::Usage(format!("the image: {error}")))?,
    };
    let made = match args.shape {
        Some(shape) => Some(Made::make(shape).await?),
        None => None,
    };
    let (resolved, config) = match &made {
        Some(made) => (read_made(common, &made.config)?, None),
        None => own(common).map(|(resolved, path)| (resolved, Some(path)))?,
    };
    there(&resolved.config, &args.models)?;
    let session = Session::start(resolved, output)?;
    let asked = args.models.iter().map(|model| Asked {
        model: model.clone(),
        image: sees(&session.config, model).then(|| image.clone()),
        tokens: args.tokens,
        first: None,
        alone: Vec::new(),
        at_once: Vec::new(),
    });
    let measured = measure(session.sarai.pool(), asked.collect(), args.runs, output).await?;
    let report = report(measured, config, args);
    show(&report, output)?;
    output.object(&report)?;
    session.close().await;
    let failed = report.checks.iter().filter(|check| check.counts && !check.holds);
    let failed: Vec<&str> = failed.map(|check| check.what).collect();
    if failed.is_empty() { Ok(()) } else { Err(Failure::Checks(failed.join("; "))) }
}

/// The installation's own configuration.
fn own(common: &Common) -> Result<(Resolved, PathBuf), Failure> {
    let path = find(common.config.as_deref()).map_err(|failure| match failure {
        Failure::NoConfiguration { .. } => {
            Failure::Usage(format!("{failure}; name one with --config, {OR_MADE}"))
        }
        other => other,
    })?;
    Ok((read(common, &path)?, path))
}

/// Whether the configuration has these models as LLMs, and whether these and the resident ones have a host or a file that is
/// there.
fn there(config: &Config, asked: &[String]) -> Result<(), Failure> {
    for name in asked {
        match config.models.iter().find(|(own, _)| own.as_str() == name) {
            None => {
                let nearest = sarai::core::nearest(name, config.models.keys().map(ModelName::as_str));
                return Err(Error::UnknownModel { model: name.clone(), nearest }.into());
            }
            Some((_, model)) if model.role != ModelRole::Llm => {
                return Err(Failure::Usage(format!("model {name} writes no text: name LLMs with --models")));
            }
            Some(_) => {}
        }
    }
    let is_needed = |name: &ModelName, model: &ModelConfig| {
        model.class == Class::Resident || asked.iter().any(|asked| asked == name.as_str())
    };
    let needed = config.models.iter().filter(|(name, model)| is_needed(name, model));
    let missing: Vec<String> = needed.filter_map(|(name, model)| missing(name, model)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::Usage(format!("{}; put files there, {OR_MADE}", missing.join("; "))))
}

/// What is said of a model whose files are not there, and for which nothing else can stand in.
fn missing(name: &ModelName, model: &ModelConfig) -> Option<String> {
    let mut files = Vec::new();
    for place in &model.places {
        match place {
            Place::Gguf(file) if !file.path.exists() => files.push(file.path.display().to_string()),
            Place::Gguf(_) | Place::Hosts { .. } | Place::Model(_) => return None,
        }
    }
    Some(format!("models.{name}: {} is not there", files.join(", ")))
}

fn sees(config: &Config, model: &str) -> bool {
    let own = config.models.iter().find(|(name, _)| name.as_str() == model);
    own.is_some_and(|(_, model)| {
        model.places.iter().any(|place| matches!(place, Place::Gguf(file) if file.mmproj.is_some()))
    })
}

/// A model that is measured, and what its answers took.
struct Asked {
    model: String,
    image: Option<Image>,
    tokens: u32,
    /// The answer that loaded it.
    first: Option<Took>,
    alone: Vec<Took>,
    at_once: Vec<Took>,
}

/// What an answer took.
struct Took {
    answer: Answer,
    first: Duration,
    all: Duration,
    tokens: u32,
}

/// What all models together wrote in a run, one after another or at once.
struct Pass {
    tokens: u64,
    seconds: f64,
}

/// What was measured.
struct Measured {
    asked: Vec<Asked>,
    /// One for each run.
    alone: Vec<Pass>,
    at_once: Vec<Pass>,
    usage: MemoryUsage,
    peak: Bytes,
    evicted: Vec<String>,
    failed: Vec<String>,
}

async fn measure(
    pool: &ModelPool,
    mut asked: Vec<Asked>,
    runs: usize,
    output: &Output,
) -> Result<Measured, Failure> {
    let limit = pool.status().await?.max_concurrent_llms;
    if asked.len() > limit {
        return Err(Failure::TooManyLlms { asked: asked.len(), limit });
    }
    let mut watch = Watch::begin(pool);
    output.note("loading the resident models, then the others");
    let models = watch.during(load(pool, &mut asked, output)).await?;
    let mut usage = pool.memory_usage().await?;
    let left: Vec<String> =
        asked.iter().filter(|one| one.place(&usage).is_none()).map(|one| one.model.clone()).collect();
    if !left.is_empty() {
        let asked = models.iter().map(|model| model.bytes).sum();
        return Err(Failure::NotAtOnce { left, asked, budget: usage.budget_bytes, models });
    }
    // Whoever had to leave and came back while they were loaded is no eviction of the runs.
    watch.forget_unloaded();
    let mut peak = held(&usage);
    let (mut alone, mut at_once, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        output.note(&format!("run {run} of {runs}: one after another, then all at once"));
        let (words, began, before) = (format!("{run} alone"), Instant::now(), written(&asked));
        for one in &mut asked {
            let took = watch.during(one.ask(pool, &words)).await;
            match took {
                Ok(took) => one.alone.push(took),
                Err(error) => failed.push(format!("{}, alone: {error}", one.model)),
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        alone.push(Pass { tokens: written(&asked) - before, seconds });
        let (words, began, before) = (format!("{run} at once"), Instant::now(), written(&asked));
        let all = futures::future::join_all(asked.iter().map(|one| one.ask(pool, &words)));
        let all = watch.during(all).await;
        let seconds = began.elapsed().as_secs_f64();
        for (one, took) in asked.iter_mut().zip(all) {
            match took {
                Ok(took) => one.at_once.push(took),
                Err(error) => failed.push(format!("{}, at once: {error}", one.model)),
            }
        }
        at_once.push(Pass { tokens: written(&asked) - before, seconds });
        usage = pool.memory_usage().await?;
        peak = peak.max(held(&usage));
    }
    let evicted = watch.unloaded().to_vec();
    Ok(Measured { asked, alone, at_once, usage, peak: peak.max(watch.most()), evicted, failed })
}

/// Loads the resident models, and then the others by a first answer, which loads whatever stands in, too. Gives what each of them
/// takes.
async fn load(pool: &ModelPool, asked: &mut [Asked], output: &Output) -> Result<Vec<Holder>, Failure> {
    for (_, loaded) in pool.load_residents().await {
        loaded?;
    }
    let mut takes: BTreeMap<ModelName, Bytes> = BTreeMap::new();
    for one in asked {
        let mut answered = one.ask(pool, "first").await;
        if matches!(answered, Err(Error::Unsupported { capability: Capability::See, .. })) {
            output.note(&format!("{} has a projector for audio alone: it is asked with text", one.model));
            one.image = None;
            answered = one.ask(pool, "first").await;
        }
        one.first = Some(answered?);
        for slot in pool.status().await?.slots.into_iter().filter(|slot| slot.reserved > Bytes::ZERO) {
            let most = takes.entry(slot.model).or_default();
            *most = slot.reserved.max(*most);
        }
    }
    Ok(takes.into_iter().map(|(model, bytes)| Holder { model, bytes }).collect())
}

impl Asked {
    /// Asks the model to write so many tokens. What it is asked begins with `words`, and the image's file ends with them, so that
    /// nothing of an earlier request serves this one.
    async fn ask(&self, pool: &ModelPool, words: &str) -> Result<Took, Error> {
        let text = format!("{words}: tell me about the sea, the wind and the stars, and do not stop.");
        let image = self.image.iter().map(|image| ending_with(image, words));
        let message = Message::user(text).with_images(image.collect());
        let sampling = Sampling {
            temperature: Some(0.0),
            seed: Some(1),
            max_tokens: Some(self.tokens),
            ..Sampling::default()
        };
        let request = GenerateRequest::chat(vec![message]).with_sampling(sampling);
        let began = Instant::now();
        let mut stream = pool.handle(&self.model)?.generate(request, CallOptions::default()).await?;
        let (mut first, mut pieces) = (None, 0);
        loop {
            match stream.next().await.ok_or(Error::ShuttingDown).flatten()? {
                AnswerEvent::Text(_) => {
                    first.get_or_insert_with(|| began.elapsed());
                    pieces += 1;
                }
                AnswerEvent::Done(answer) => {
                    let tokens = answer.completion_tokens.unwrap_or(pieces);
                    let all = began.elapsed();
                    return Ok(Took { first: first.unwrap_or(all), all, tokens, answer });
                }
            }
        }
    }

    fn last(&self) -> Option<&Took> {
        self.at_once.last().or(self.alone.last()).or(self.first.as_ref())
    }

    /// The place that answered last, where it is ready.
    fn place<'u>(&self, usage: &'u MemoryUsage) -> Option<&'u ModelMemory> {
        let by = &self.last()?.answer.provenance.served_by;
        let answered = |place: &ServedBy| match place {
            ServedBy::OneOf(hosts) => hosts.contains(by),
            one => one == by,
        };
        usage.models.iter().find(|model| model.state == "ready" && answered(&model.served_by))
    }
}

/// The same picture in another file: what follows on an image's end is not read. One that has no room for it stays as it is.
fn ending_with(image: &Image, words: &str) -> Image {
    Image::new([image.bytes(), words.as_bytes()].concat()).unwrap_or_else(|_| image.clone())
}

/// Tokens of all answers so far.
fn written(asked: &[Asked]) -> u64 {
    let answers = asked.iter().flat_map(|one| one.alone.iter().chain(&one.at_once));
    answers.map(|took| u64::from(took.tokens)).sum()
}

/// What was measured of all models together.
fn held(usage: &MemoryUsage) -> Bytes {
    usage.models.iter().filter_map(|model| model.measured_bytes).sum()
}

fn report(measured: Measured, config: Option<PathBuf>, args: &ConcurrentArgs) -> Report {
    let Measured { asked, alone, at_once, usage, peak, evicted, failed } = measured;
    let models: Vec<Row> = asked.iter().map(|one| row(one, &usage)).collect();
    let ready = asked.iter().filter(|one| one.place(&usage).is_some()).count();
    let (one_after_another, at_once) = (Total::of(&alone), Total::of(&at_once));
    let ratio = at_once.tokens_per_second.zip(one_after_another.tokens_per_second).map(|(a, b)| a / b);
    let wrote = |all: &[Took]| all.iter().filter(|took| took.tokens > 0).count();
    let wrote: usize = asked.iter().map(|one| wrote(&one.alone) + wrote(&one.at_once)).sum();
    let (requests, budget, reserved) = (2 * args.runs * asked.len(), usage.budget_bytes, usage.peak_bytes);
    let check = |what, holds, found| Check { what, holds, counts: true, found };
    let checks = vec![
        check(
            "memory within the budget",
            peak <= budget && reserved <= budget,
            format!("{peak} measured and {reserved} reserved of {budget}"),
        ),
        check("nothing evicted", evicted.is_empty(), format!("{} evictions", evicted.len())),
        check("every request answered", wrote == requests, format!("{wrote} of {requests}")),
        check("all models ready at once", ready == asked.len(), format!("{ready} of {}", asked.len())),
        Check {
            what: "at least as fast as one after another",
            holds: ratio.is_some_and(|ratio| ratio >= 1.0),
            // Tiny models compute next to nothing: how fast they are together says nothing of others.
            counts: args.shape != Some(ShapeArg::Tiny),
            found: ratio.map_or_else(|| "nothing to compare".to_owned(), |ratio| format!("{ratio:.2} times")),
        },
    ];
    Report {
        config,
        shape: args.shape,
        runs: args.runs,
        tokens: args.tokens,
        models,
        one_after_another,
        at_once,
        ratio,
        budget_bytes: budget,
        peak_bytes: peak,
        reserved_peak_bytes: reserved,
        evictions: evicted,
        failed,
        checks,
    }
}

fn row(one: &Asked, usage: &MemoryUsage) -> Row {
    let (last, place) = (one.last().map(|took| &took.answer.provenance), one.place(usage));
    Row {
        model: one.model.clone(),
        served_by: last.map(|last| last.served_by.to_string()),
        fallback_reason: last.and_then(|last| last.fallback_reason.clone()),
        n_ctx: last.and_then(|last| last.n_ctx),
        saw_image: one.image.is_some(),
        alone: Speed::of(&one.alone),
        at_once: Speed::of(&one.at_once),
        reserved_bytes: place.map(|place| place.reserved_bytes),
        measured_bytes: place.and_then(|place| place.measured_bytes),
    }
}

impl Speed {
    fn of(all: &[Took]) -> Self {
        let decoding = |took: &Took| {
            let time = took.all.saturating_sub(took.first).as_secs_f64();
            f64::from(took.tokens.saturating_sub(1)) / time.max(f64::EPSILON)
        };
        let speed = |took: &Took| took.answer.tokens_per_second.unwrap_or_else(|| decoding(took));
        Self {
            first_token_ms: median(all.iter().map(|took| took.first.as_secs_f64() * 1e3)),
            tokens_per_second: median(all.iter().map(speed)),
        }
    }
}

impl Total {
    fn of(runs: &[Pass]) -> Self {
        let speed = |run: &Pass| run.tokens as f64 / run.seconds.max(f64::EPSILON);
        Self {
            tokens: runs.iter().map(|run| run.tokens).sum(),
            seconds: runs.iter().map(|run| run.seconds).sum(),
            tokens_per_second: median(runs.iter().map(speed)),
        }
    }
}

/// The middle one, or the mean of the two in the middle.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = values.len() / 2;
    let lower = if values.len() % 2 == 1 { upper } else { upper.checked_sub(1)? };
    Some(f64::midpoint(*values.get(lower)?, *values.get(upper)?))
}

fn show(report: &Report, output: &Output) -> Result<(), Failure> {
    output.line(&speeds(&report.models).to_string())?;
    for Row { model, fallback_reason, .. } in &report.models {
        if let Some(reason) = fallback_reason {
            output.line(&format!("{model} fell back: {reason}"))?;
        }
    }
    if !report.models.iter().any(|row| row.saw_image) {
        output.note("no image was shown: none of these models has a projector (mmproj:)");
    }
    output.line(&format!(
        "one after another {} tokens/s, at once {} tokens/s",
        figure(report.one_after_another.tokens_per_second, 1),
        figure(report.at_once.tokens_per_second, 1),
    ))?;
    for what in report.failed.iter().chain(&report.evictions) {
        output.line(&format!("     {what}"))?;
    }
    for Check { what, holds, counts, found } in &report.checks {
        let verdict = match (holds, counts) {
            (true, _) => "ok  ",
            (false, true) => "FAIL",
            (false, false) => "no  ",
        };
        output.line(&format!("{verdict} {what}: {found}"))?;
    }
    Ok(())
}

fn speeds(rows: &[Row]) -> Table {
    let mut table = table(
        ["MODEL", "FIRST ALONE", "AT ONCE", "TOKENS/S ALONE", "AT ONCE", "RESERVED", "MEASURED", "SERVED BY"],
        &[1, 2, 3, 4, 5, 6],
    );
    let bytes = |bytes: Option<Bytes>| bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
    for row in rows {
        let image = if row.saw_image { " (image)" } else { "" };
        table.add_row([
            format!("{}{image}", row.model),
            format!("{} ms", figure(row.alone.first_token_ms, 0)),
            format!("{} ms", figure(row.at_once.first_token_ms, 0)),
            figure(row.alone.tokens_per_second, 1),
            figure(row.at_once.tokens_per_second, 1),
            bytes(row.reserved_bytes),
            bytes(row.measured_bytes),
            row.served_by.as_deref().map_or_else(|| "-".to_owned(), shorten),
        ]);
    }
    table
}

fn figure(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_of_what_there_is() {
        let of = |values: &[f64]| median(values.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[3.0]), Some(3.0));
        assert_eq!(of(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(of(&[4.0, 1.0, 9.0, 2.0]), Some(3.0));
    }

    #[test]
    fn the_same_picture_in_another_file_is_still_an_image() {
        let image = Image::new(PICTURE).unwrap();
        let other = ending_with(&image, "1 alone");
        assert!(other != image && other.bytes().starts_with(image.bytes()));
    }
}

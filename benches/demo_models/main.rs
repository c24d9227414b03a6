//! How often the demo's models are right, on questions they know and on what no training has seen: `cargo bench --bench
//! demo_models`. Always the likeliest token, one thread. `scripts/demo_models/make` writes the cases and trains the models.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

mod cases;

use std::path::{Path, PathBuf};
use std::time::Instant;

use cases::{Asked, Cases, Routed, Said, Shown, Toned};
use clap::Parser;
use comfy_table::{Table, presets};
use futures::StreamExt;
use sarai::{
    AnswerEvent, AnswerStream, Audio, CallOptions, GenerateRequest, Image, Message, Sampling, Sarai, Tones,
    TranscribeRequest,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Counts how often the demo's models are right.
#[derive(Debug, Parser)]
#[command(name = "demo_models", bin_name = "cargo bench --bench demo_models --")]
struct Args {
    /// The folder with cases.json and the recordings and pictures that it names
    #[arg(long, value_name = "DIR", default_value = "target/demo_models/evaluation/test")]
    cases: PathBuf,
    /// The folder with the models' files
    #[arg(long, value_name = "DIR", default_value = "config/demo")]
    models: PathBuf,
    /// Show what was wrong, on stderr
    #[arg(long)]
    wrong: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// How often something was right.
struct Row {
    what: &'static str,
    right: usize,
    of: usize,
    /// The least part that has to be right; figures without one are for information.
    bar: Option<f64>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let cases = Cases::read(&args.cases)?;
    let models = Models::start(&args).await?;
    let mut rows = Vec::new();
    let mut turns = Vec::new();
    let answered = |what, cases, bar| models.answered(what, cases, bar);
    rows.push(answered("trained questions answered", &cases.trained, 0.99).await?);
    rows.push(answered("held-out paraphrases answered", &cases.paraphrases, 0.92).await?);
    rows.push(answered("off-topic questions refused", &cases.off_topic, 0.85).await?);
    if !cases.tones.is_empty() {
        rows.extend(models.toned(&cases.tones).await?);
    }
    rows.extend(models.heard(&cases.speech, &mut turns).await?);
    rows.push(models.heard_unseen(&cases.unseen_speech).await?);
    rows.push(models.seen(&cases.pictures).await?);
    if !cases.router.is_empty() {
        rows.push(models.routed(&cases.router).await?);
    }
    rows.push(models.alike(&cases).await?);
    models.sarai.shutdown(std::time::Duration::from_secs(10)).await;

    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["what", "right", "of", "part", "bar"]);
    let mut below = Vec::new();
    for Row { what, right, of, bar } in rows {
        let part = right as f64 / of as f64;
        if bar.is_some_and(|bar| part < bar) {
            below.push(what);
        }
        let bar = bar.map_or_else(|| "-".to_owned(), |bar| format!("{:.0} %", bar * 100.0));
        table.add_row([
            what.to_owned(),
            right.to_string(),
            of.to_string(),
            format!("{:.1} %", part * 100.0),
            bar,
        ]);
    }
    println!("{table}");
    turns.sort_unstable();
    let median = turns.get(turns.len() / 2).copied().unwrap_or_default();
    println!("a whole turn (speech, answer, tone) on one thread: median {median} ms, bar 150 ms");
    if median > 150 {
        below.push("the time of a whole turn");
    }
    if below.is_empty() { Ok(()) } else { Err(format!("below the bar: {}", below.join(", ")).into()) }
}

/// The demo's configuration, every place on this machine, one thread each.
struct Models<'a> {
    args: &'a Args,
    sarai: Sarai,
    _folder: tempfile::TempDir,
}

impl<'a> Models<'a> {
    async fn start(args: &'a Args) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut config: serde_json::Value = serde_yaml::from_str(include_str!("../../config/demo.yaml"))?;
        for (name, model) in config["models"].as_object_mut().ok_or("the demo has models")? {
            model["threads"] = 1.into();
            model["backend"] = "gguf_native".into();
            let model = model.as_object_mut().ok_or("a model is a mapping")?;
            for key in ["fallback", "host", "host_model"] {
                model.remove(key);
            }
            for key in ["path", "mmproj"] {
                let Some(path) = model.get_mut(key) else { continue };
                let file = path.as_str().and_then(|path| Path::new(path).file_name());
                let file = args.models.join(file.ok_or_else(|| format!("{name} has no {key}"))?);
                *path = std::path::absolute(file)?.to_string_lossy().into();
            }
        }
        let path = folder.path().join("demo.yaml");
        // JSON is YAML.
        std::fs::write(&path, config.to_string())?;
        Ok(Self { args, sarai: Sarai::from_file(path).await?, _folder: folder })
    }

    /// Tells what was wrong, where that is wanted.
    fn check(&self, asked: &str, said: &str, right: &str) -> bool {
        let is_right = said.trim() == right;
        if !is_right {
            self.wrong(asked, said, right);
        }
        is_right
    }

    fn wrong(&self, asked: &str, said: &str, right: &str) {
        if self.args.wrong {
            eprintln!("{asked}\n  said:  {}\n  right: {right}", said.trim());
        }
    }

    async fn ask(&self, model: &str, request: GenerateRequest) -> Result<String> {
        let sampling = Sampling { temperature: Some(0.0), max_tokens: Some(120), ..Sampling::default() };
        let handle = self.sarai.pool().handle(model)?;
        said(handle.generate(request.with_sampling(sampling), CallOptions::default()).await?).await
    }

    async fn answer(&self, question: &str) -> Result<String> {
        self.ask("solar", GenerateRequest::chat(vec![Message::user(question)])).await
    }

    async fn answered(&self, what: &'static str, cases: &[Asked], bar: f64) -> Result<Row> {
        let mut right = 0;
        for Asked { text, answer } in cases {
            right += usize::from(self.check(text, &self.answer(text).await?, answer));
        }
        Ok(Row { what, right, of: cases.len(), bar: Some(bar) })
    }

    async fn say_in(&self, tone: &str, text: &str) -> Result<String> {
        let tones = Tones::default();
        let tone = tones.get(tone).ok_or_else(|| format!("there is no tone {tone}"))?;
        self.ask("lfm2", tone.request(text)).await
    }

    async fn toned(&self, cases: &[Toned]) -> Result<[Row; 2]> {
        let (mut kept, mut exact) = (0, 0);
        for case in cases {
            let said = self.say_in(&case.tone, &case.text).await?;
            let said = said.trim();
            let right = case.kept.iter().all(|kept| said.contains(kept.as_str()))
                && said.starts_with(&case.begins)
                && said.ends_with(&case.ends);
            if !right {
                self.wrong(&format!("{}: {}", case.tone, case.text), said, &case.said);
            }
            kept += usize::from(right);
            exact += usize::from(said == case.said);
        }
        let of = cases.len();
        Ok([
            Row { what: "tones: names, numbers and mark there", right: kept, of, bar: Some(0.8) },
            Row { what: "tones: to the letter", right: exact, of, bar: None },
        ])
    }

    async fn transcribe(&self, file: &str) -> Result<String> {
        let audio = Audio::new(std::fs::read(self.args.cases.join(file))?)?;
        let handle = self.sarai.pool().handle("omni")?;
        said(handle.transcribe(TranscribeRequest::new(audio), CallOptions::default()).await?).await
    }

    /// Transcripts, and whole turns; how long each of these took, in milliseconds.
    async fn heard(&self, cases: &[Said], turns: &mut Vec<u128>) -> Result<[Row; 3]> {
        let (mut exact, mut answers, mut whole) = (0, 0, 0);
        for case in cases {
            let began = Instant::now();
            let heard = self.transcribe(&case.file).await?;
            let answer = self.answer(heard.trim()).await?;
            let said = self.say_in(&case.tone, answer.trim()).await?;
            turns.push(began.elapsed().as_millis());
            exact += usize::from(self.check(&format!("{} ({})", case.file, case.voice), &heard, &case.text));
            answers += usize::from(answer.trim() == case.answer);
            whole += usize::from(self.check(&case.text, &said, &case.said));
        }
        let of = cases.len();
        Ok([
            Row {
                what: "transcripts exact, trained phrases, held-out voices",
                right: exact,
                of,
                bar: Some(0.93),
            },
            Row { what: "  answered rightly", right: answers, of, bar: None },
            Row { what: "whole turn right (speech, answer, tone)", right: whole, of, bar: Some(0.93) },
        ])
    }

    async fn heard_unseen(&self, cases: &[Said]) -> Result<Row> {
        let mut right = 0;
        for case in cases {
            right += usize::from(self.check(&case.file, &self.transcribe(&case.file).await?, &case.text));
        }
        Ok(Row { what: "transcripts exact, phrases never trained", right, of: cases.len(), bar: None })
    }

    async fn seen(&self, cases: &[Shown]) -> Result<Row> {
        let mut right = 0;
        for Shown { file, asked, text } in cases {
            let image = Image::new(std::fs::read(self.args.cases.join(file))?)?;
            let request = GenerateRequest::chat(vec![Message::user(asked.as_str()).with_images(vec![image])]);
            right += usize::from(self.check(file, &self.ask("omni", request).await?, text));
        }
        Ok(Row { what: "pictures named", right, of: cases.len(), bar: Some(0.92) })
    }

    async fn routed(&self, cases: &[Routed]) -> Result<Row> {
        let router = self.sarai.router().ok_or("the demo has a router")?;
        let mut right = 0;
        for Routed { text, label } in cases {
            let routing = router.route(text, self.sarai.pool(), CallOptions::default()).await?;
            let won = routing.scores.first().map_or("", |score| score.label.as_str());
            right += usize::from(self.check(text, won, label));
        }
        Ok(Row { what: "router labels", right, of: cases.len(), bar: Some(0.9) })
    }

    /// How often a held-out paraphrase is nearest to a trained question of its own intent.
    async fn alike(&self, cases: &Cases) -> Result<Row> {
        let handle = self.sarai.pool().handle("embedding")?;
        let texts = |cases: &[Asked]| cases.iter().map(|case| case.text.clone()).collect();
        let (known, _) = handle.embed(texts(&cases.trained), CallOptions::default()).await?;
        let (asked, _) = handle.embed(texts(&cases.paraphrases), CallOptions::default()).await?;
        let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let mut right = 0;
        for (vector, case) in asked.vectors.iter().zip(&cases.paraphrases) {
            let likeness = known.vectors.iter().map(|other| product(vector, other));
            let nearest = likeness.enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
            right += usize::from(nearest.is_some_and(|(at, _)| cases.trained[at].answer == case.answer));
        }
        Ok(Row {
            what: "paraphrases nearest to their own question",
            right,
            of: cases.paraphrases.len(),
            bar: None,
        })
    }
}

async fn said(mut stream: AnswerStream) -> Result<String> {
    let mut said = String::new();
    while let Some(event) = stream.next().await {
        if let AnswerEvent::Text(text) = event? {
            said.push_str(&text);
        }
    }
    Ok(said)
}

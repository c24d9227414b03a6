//! A loaded model that reads whole texts: it embeds them, or scores them by its classification head. Texts of several
//! requests share a step, up to a number of tokens.

use std::sync::Arc;

use async_trait::async_trait;
use llama_cpp_2::token::LlamaToken;
use sarai_core::backend::{LoadRequest, Model};
use sarai_core::failure::Failure;
use sarai_core::memory::{Footprint, Freed};
use sarai_core::request::{Capability, Embeddings, LabelScore};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::context::{Batch, Context, SeqId, Step, compute};
use super::header::Header;
use super::load::Loaded;
use super::measure::Growth;
use super::thread::{Resize, Thread, Workplace};
use super::{GgufSettings, check, runtime};
use crate::Error;

/// Texts in one step.
pub(super) const TEXTS: u32 = 16;
/// Tokens in a step, where no single text has more: the cost of attention grows with the square.
pub(super) const TOKENS: usize = 512;

#[derive(Debug)]
pub(super) struct Encoder {
    thread: Thread<Command>,
    labels: Vec<String>,
    purpose: Capability,
}

/// What the thread is asked for.
#[derive(Debug)]
enum Command {
    Read(Job),
    Stop,
}

/// Texts to read, and where their results go, in the texts' order. Whoever does not want them any more drops the other
/// end.
#[derive(Debug)]
struct Job {
    texts: Vec<Vec<LlamaToken>>,
    results: Vec<Vec<f32>>,
    reply: oneshot::Sender<Result<Vec<Vec<f32>>, Error>>,
}

impl Encoder {
    pub(super) async fn load(
        settings: Arc<GgufSettings>,
        header: Header,
        request: LoadRequest,
    ) -> Result<Self, Failure> {
        let (labels, purpose) = (check::labels(&header), settings.purpose);
        let thread = Thread::start(settings, header, request, work).await?;
        Ok(Self { thread, labels, purpose })
    }

    /// The model's results for texts, and the texts' tokens.
    async fn read(
        &self,
        tokens: impl FnOnce(&Loaded) -> Result<Vec<Vec<LlamaToken>>, Error> + Send + 'static,
    ) -> Result<(Vec<Vec<f32>>, usize), Failure> {
        let n_ctx = self.thread.n_ctx();
        let texts = self
            .thread
            .with_model(move |loaded| {
                let texts = tokens(loaded)?;
                check_lengths(&texts, n_ctx)?;
                Ok(texts)
            })
            .await?;
        let count = texts.iter().map(Vec::len).sum();
        if texts.is_empty() {
            return Ok((Vec::new(), 0));
        }
        let (reply, answer) = oneshot::channel();
        let results = Vec::with_capacity(texts.len());
        self.thread.send(Command::Read(Job { texts, results, reply })).await?;
        let results = answer.await.map_err(|_| self.thread.gone())??;
        Ok((results, count))
    }
}

fn check_lengths(texts: &[Vec<LlamaToken>], n_ctx: u32) -> Result<(), Error> {
    for (index, text) in texts.iter().enumerate() {
        if text.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if text.len() > n_ctx as usize {
            return Err(Error::TextTooLong { index, tokens: text.len(), n_ctx });
        }
    }
    Ok(())
}

#[async_trait]
impl Model for Encoder {
    fn n_ctx(&self) -> Option<u32> {
        Some(self.thread.n_ctx())
    }

    fn memory(&self) -> Option<Footprint> {
        self.thread.memory()
    }

    fn memory_at_load(&self) -> Option<Footprint> {
        self.thread.memory_at_load()
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embeddings, Failure> {
        self.wants(Capability::Embed)?;
        let tokens = move |loaded: &Loaded| {
            let vocab = loaded.model().vocab();
            Ok(texts.iter().map(|text| vocab.tokenize(text.as_bytes(), true, false)).collect())
        };
        let (vectors, count) = self.read(tokens).await?;
        Ok(Embeddings::normalised(vectors, u32::try_from(count).ok()))
    }

    /// Probabilities that sum to 1, or that of the only label.
    async fn classify(&self, text: String) -> Result<Vec<LabelScore>, Failure> {
        self.wants(Capability::Classify)?;
        let tokens =
            move |loaded: &Loaded| Ok(vec![loaded.model().vocab().tokenize(text.as_bytes(), true, false)]);
        let (results, _) = self.read(tokens).await?;
        let scores = results.first().map(|scores| probabilities(scores)).unwrap_or_default();
        if scores.len() != self.labels.len() {
            let reason = format!("{} scores for {} labels", scores.len(), self.labels.len());
            return Err(Error::Compute { reason }.into());
        }
        let labelled = self.labels.iter().zip(scores);
        let mut scored: Vec<LabelScore> =
            labelled.map(|(label, score)| LabelScore { label: label.clone(), score }).collect();
        scored.sort_by(|a, b| b.score.total_cmp(&a.score));
        Ok(scored)
    }

    async fn rerank(&self, query: String, documents: Vec<String>) -> Result<Vec<f32>, Failure> {
        self.wants(Capability::Rerank)?;
        let pairs = move |loaded: &Loaded| {
            Ok(documents.iter().map(|document| pair(loaded, &query, document)).collect())
        };
        let (results, _) = self.read(pairs).await?;
        Ok(results.iter().map(|scores| probabilities(&scores[..1.min(scores.len())])[0]).collect())
    }

    async fn unload(&self) -> Option<Freed> {
        self.thread.unload(Command::Stop).await
    }
}

impl Encoder {
    fn wants(&self, capability: Capability) -> Result<(), Failure> {
        if self.purpose == capability {
            return Ok(());
        }
        let message = format!("this model was loaded to {}, not to {capability}", self.purpose);
        Err(Failure::new(sarai_core::failure::FailureKind::Unsupported, message))
    }
}

/// Query and document as models that rerank were trained with them: each closed by the vocabulary's end, the document
/// behind its separator. Source: llama.cpp, tools/server, `format_prompt_rerank`.
fn pair(loaded: &Loaded, query: &str, document: &str) -> Vec<LlamaToken> {
    let vocab = loaded.model().vocab();
    let real = |token: LlamaToken| (token.0 >= 0).then_some(token);
    let bos = real(vocab.bos()).filter(|_| vocab.should_add_bos());
    let eos = real(vocab.eos()).or(real(vocab.sep())).filter(|_| vocab.should_add_eos());
    let sep = real(vocab.sep()).filter(|_| vocab.should_add_sep());
    let text = |text: &str| vocab.tokenize(text.as_bytes(), false, false);
    bos.into_iter().chain(text(query)).chain(eos).chain(sep).chain(text(document)).chain(eos).collect()
}

/// The thread's work: texts of all who ask, until it is told to stop.
fn work(workplace: Workplace<'_, Command>) -> Option<Resize> {
    let Workplace { shape, context, growth, commands, stopping, .. } = workplace;
    // A step of a short context has room for no more.
    let most = TOKENS.min(shape.n_batch as usize);
    let mut reader =
        Reader { context, batch: Batch::default(), jobs: Vec::new(), most, threads: shape.threads, growth };
    while reader.listen(commands) && !stopping.is_cancelled() {
        reader.jobs.retain(|job| !job.reply.is_closed());
        if !reader.jobs.is_empty() {
            reader.step(stopping);
        }
    }
    None
}

struct Reader<'m> {
    context: Context<'m>,
    batch: Batch,
    /// The one whose turn it is first.
    jobs: Vec<Job>,
    /// Tokens in a step of several texts.
    most: usize,
    threads: usize,
    growth: &'m mut Growth,
}

impl Reader<'_> {
    /// Hears what there is to hear; waits where there is nothing to do. Returns whether to go on.
    fn listen(&mut self, commands: &mut mpsc::Receiver<Command>) -> bool {
        if self.jobs.is_empty() {
            match commands.blocking_recv() {
                Some(Command::Read(job)) => self.jobs.push(job),
                Some(Command::Stop) | None => return false,
            }
        }
        loop {
            match commands.try_recv() {
                Ok(Command::Read(job)) => self.jobs.push(job),
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    /// Computes some texts of all jobs.
    fn step(&mut self, stopping: &CancellationToken) {
        let chosen = self.choose();
        self.batch.clear();
        for (place, &(job, text)) in chosen.iter().enumerate() {
            for (position, token) in self.jobs[job].texts[text].iter().enumerate() {
                self.batch.push(*token, position, place as SeqId, true);
            }
        }
        let unread = || chosen.iter().all(|(job, _)| self.jobs[*job].reply.is_closed());
        let stepped = runtime::computing(self.threads, self.growth, self.batch.len(), |threads| {
            self.context.set_threads(threads);
            self.context.decode(&self.batch, &|| stopping.is_cancelled() || unread())
        });
        let results = match stepped {
            Ok(Step::Done) => {
                let result = |place| self.context.pooled(place as SeqId).map(<[f32]>::to_vec);
                (0..chosen.len()).map(result).collect::<Result<Vec<_>, Error>>()
            }
            // Nobody waits for it.
            Ok(Step::Stopped) => return self.clear(chosen.len()),
            Ok(Step::Full) => Err(compute("the texts do not fit the context")),
            Err(error) => Err(error),
        };
        self.clear(chosen.len());
        match results {
            Ok(results) => {
                for ((job, _), result) in chosen.into_iter().zip(results) {
                    self.jobs[job].results.push(result);
                }
                for job in self.jobs.extract_if(.., |job| job.results.len() == job.texts.len()) {
                    // Whoever has left does not want to know.
                    let _left = job.reply.send(Ok(job.results));
                }
                if !self.jobs.is_empty() {
                    self.jobs.rotate_left(1);
                }
            }
            Err(error) => {
                let reason = error.to_string();
                for job in (0..self.jobs.len()).rev().filter(|at| chosen.iter().any(|(job, _)| job == at)) {
                    let failed = Error::Compute { reason: reason.clone() };
                    let _left = self.jobs.remove(job).reply.send(Err(failed));
                }
            }
        }
    }

    /// The next texts, by job and number: one of each job by turns as long as its next one fits, the first one in any
    /// case.
    fn choose(&self) -> Vec<(usize, usize)> {
        let mut chosen = Vec::new();
        let mut tokens = 0;
        let mut open: Vec<usize> = (0..self.jobs.len()).collect();
        for round in 0.. {
            open.retain(|&at| {
                let number = self.jobs[at].results.len() + round;
                let text = self.jobs[at].texts.get(number).filter(|text| {
                    chosen.is_empty() || tokens + text.len() <= self.most && chosen.len() < TEXTS as usize
                });
                if let Some(text) = text {
                    chosen.push((at, number));
                    tokens += text.len();
                }
                text.is_some()
            });
            if open.is_empty() {
                break;
            }
        }
        chosen
    }

    /// A model that also generates keeps what it reads; it is not needed again.
    fn clear(&mut self, places: usize) {
        for place in 0..places {
            self.context.forget(place as SeqId);
        }
    }
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

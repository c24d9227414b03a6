//! The loop that serves all requests of one generating model. Each request is a sequence of the context; every step
//! computes the next token of all that write and a part of the prompts of all that read. Between two steps the loop hears
//! of new requests and of readers who have left.
//!
//! What a sequence holds stays in the context when it ends, as long as there is room: a request that begins in the same
//! way goes on with it. What has to leave is written to the session store.

mod kept;
mod layout;
mod pace;
mod seam;
mod sequence;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sarai_core::request::FinishReason;
use tokio::sync::mpsc::Receiver;
use tokio::sync::mpsc::error::TryRecvError;
use tokio_util::sync::CancellationToken;

use super::context::{Batch, Context, SeqId, Shape, Step};
use super::load::Loaded;
use super::measure::Growth;
use super::prompt::common;
use super::runtime;
use super::sessions::Sessions;
use super::thread::Resize;
use crate::Error;
use kept::{Entry, Kept};
use pace::{Pace, split};
use sequence::Goes;

pub(super) use kept::reusable;
pub(super) use layout::{Layout, Next};
pub(super) use sequence::Sequence;

/// How long a request to an idle engine is held back for others that are being prepared.
const LINGER: Duration = Duration::from_millis(2);
/// Sequences that are kept besides those that run.
const KEPT: u32 = 8;
/// A shorter common beginning is not worth waiting for someone who is computing it.
const WORTH_WAITING: usize = 64;
/// Reading it from disk is not worth it for fewer tokens than this.
const WORTH_READING: usize = 32;

/// Sequences that a context needs for so many requests at once.
pub(super) const fn sequences(parallel: u32) -> u32 {
    parallel + KEPT
}

/// What the engine is told.
#[derive(Debug)]
pub(super) enum Command {
    /// Answer this.
    Answer(Box<Sequence>),
    /// End, to be begun again with another context. What was computed goes to the session store, from which it comes back.
    Resize(Resize),
    /// End; sent when the token is cancelled, to wake the thread.
    Stop,
}

/// Requests that are being prepared.
#[derive(Clone, Debug, Default)]
pub(super) struct Coming(Arc<AtomicUsize>);

/// A request that is being prepared, until this is dropped.
#[derive(Debug)]
pub(super) struct Announced(Arc<AtomicUsize>);

impl Coming {
    pub(super) fn announce(&self) -> Announced {
        self.0.fetch_add(1, Ordering::Relaxed);
        Announced(Arc::clone(&self.0))
    }

    fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The engine of one model.
pub(super) struct Engine<'m> {
    loaded: &'m Loaded,
    context: Context<'m>,
    sessions: Option<Sessions>,
    /// In the order in which they came; of those that had to make room for others, at the front.
    waiting: VecDeque<Sequence>,
    /// In the order in which they were let in.
    running: Vec<Sequence>,
    kept: Kept,
    /// Sequences of the context that hold nothing.
    free: Vec<SeqId>,
    parallel: usize,
    /// Whether a sequence can only be gone on with as a whole.
    whole: bool,
    /// Whether the context was full: nobody is let in before somebody has ended.
    full: bool,
    /// Whether the last step was an image's or audio's: those who read and write text come next.
    looked: bool,
    pace: Pace,
    batch: Batch,
    threads: usize,
    growth: &'m mut Growth,
    resize: Option<Resize>,
}

/// A sequence's part of a step.
struct Part {
    /// Which of the running.
    at: usize,
    tokens: usize,
    /// The row of its last token, where that is followed by a choice.
    row: Option<usize>,
}

/// A beginning of a prompt that the context holds.
struct There {
    place: SeqId,
    length: usize,
    /// Whether it is all of a sequence that nobody writes to any more.
    ends_there: bool,
}

impl<'m> Engine<'m> {
    pub(super) fn new(
        loaded: &'m Loaded,
        context: Context<'m>,
        sessions: Option<Sessions>,
        shape: &Shape,
        parallel: u32,
        growth: &'m mut Growth,
    ) -> Self {
        let whole = loaded.is_recurrent();
        Self {
            loaded,
            context,
            sessions,
            waiting: VecDeque::new(),
            running: Vec::new(),
            kept: Kept::new(whole),
            free: (0..shape.n_seq as SeqId).rev().collect(),
            parallel: parallel as usize,
            whole,
            full: false,
            looked: false,
            pace: Pace::new(shape.n_batch as usize, !whole),
            batch: Batch::default(),
            threads: shape.threads,
            growth,
            resize: None,
        }
    }

    /// Works until it is told to stop or nobody can tell it anything any more, and then writes what it has computed to
    /// the session store. Returns the context to begin again with, where it is told of one.
    pub(super) fn run(
        mut self,
        commands: &mut Receiver<Command>,
        coming: &Coming,
        stopping: &CancellationToken,
    ) -> Option<Resize> {
        while self.listen(commands, coming) && !stopping.is_cancelled() {
            self.leave();
            self.let_in();
            if !self.running.is_empty() {
                self.step(stopping, &|| !commands.is_empty());
            }
        }
        // Whoever still waits for an answer hears that the engine is gone by the end of the stream.
        for sequence in std::mem::take(&mut self.running) {
            self.keep(sequence);
        }
        for entry in self.kept.take_all() {
            self.store(&entry);
        }
        self.resize
    }

    /// Hears what there is to hear; waits where there is nothing to do. Returns whether to go on.
    fn listen(&mut self, commands: &mut Receiver<Command>, coming: &Coming) -> bool {
        let idle = self.running.is_empty() && self.waiting.is_empty();
        if idle {
            match commands.blocking_recv() {
                Some(Command::Answer(sequence)) => self.waiting.push_back(*sequence),
                Some(Command::Resize(resize)) => return self.ends_for(resize),
                Some(Command::Stop) | None => return false,
            }
        }
        // Requests that were made together begin together.
        let heard = Instant::now();
        let linger = || idle && coming.any() && heard.elapsed() < LINGER;
        loop {
            match commands.try_recv() {
                Ok(Command::Answer(sequence)) => self.waiting.push_back(*sequence),
                Ok(Command::Resize(resize)) => return self.ends_for(resize),
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) if linger() => std::thread::yield_now(),
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn ends_for(&mut self, resize: Resize) -> bool {
        self.resize = Some(resize);
        false
    }

    /// Lets go of the sequences whose readers have left. What they have computed stays: they may ask again.
    fn leave(&mut self) {
        self.waiting.retain(|sequence| !sequence.unread());
        let left: Vec<Sequence> = self.running.extract_if(.., |sequence| sequence.unread()).collect();
        for sequence in left {
            self.keep(sequence);
            self.full = false;
        }
    }

    /// Lets in whoever can be: below the limit, with room in the context, and not waiting for what another one computes.
    fn let_in(&mut self) {
        let mut at = 0;
        while at < self.waiting.len() && self.running.len() < self.parallel {
            if self.waiting[at].wants_none() {
                if let Some(mut sequence) = self.waiting.remove(at) {
                    sequence.end(FinishReason::Length);
                }
                continue;
            }
            if !self.running.is_empty() && (self.full || !self.has_room(&self.waiting[at])) {
                return;
            }
            if self.comes_soon(at) {
                at += 1;
                continue;
            }
            let Some(mut sequence) = self.waiting.remove(at) else { return };
            self.begin(&mut sequence);
            self.running.push(sequence);
        }
    }

    /// Whether the tokens of all that run leave room for this one, common beginnings counted once. Those who write may
    /// still run out of it; see [`make_room`](Self::make_room).
    fn has_room(&self, new: &Sequence) -> bool {
        let own = |(at, sequence): (usize, &Sequence)| {
            let others = self.running[..at].iter().map(|other| common(&other.tokens, &sequence.tokens));
            sequence.tokens.len() - others.max().unwrap_or(0)
        };
        let held: usize = self.running.iter().chain([new]).enumerate().map(own).sum();
        held < self.context.n_ctx() as usize
    }

    /// Whether somebody is computing a beginning that this one has in common with it, and should be waited for. Where
    /// only whole sequences can be shared, that one is asked to leave a copy there.
    fn comes_soon(&mut self, at: usize) -> bool {
        let new = &self.waiting[at];
        let prompt = &new.tokens[..new.tokens.len() - 1];
        let had = self.kept.best(&new.tokens).map_or(0, |(_, length)| length);
        for leader in &mut self.running {
            // An image that both begin with is waited for as a whole.
            let common = leader.layout.whole(common(leader.prompt(), prompt));
            if common >= had + WORTH_WAITING && leader.computed < common {
                if self.whole && !leader.marks.contains(&common) {
                    leader.marks.push(common);
                    leader.marks.sort_unstable();
                }
                return true;
            }
        }
        false
    }

    /// Gives a sequence its place in the context, with all of its beginning that is there already or on disk.
    fn begin(&mut self, sequence: &mut Sequence) {
        let (place, computed) = self.beginning(sequence);
        // Of what was restored or taken over, only the common beginning counts.
        if !self.whole {
            self.context.cut(place, sequence.layout.position(computed));
        }
        sequence.place = Some(place);
        sequence.computed = computed;
        sequence.cached.get_or_insert(computed);
        if self.whole {
            // The next turn begins where this prompt ends. Stopping there costs a step.
            let end = sequence.prompt().len() - 1;
            if end >= computed + WORTH_WAITING && !sequence.marks.contains(&end) {
                sequence.marks.push(end);
            }
        } else {
            sequence.marks.clear();
        }
    }

    /// A place that holds as much as possible of the beginning of a sequence, and how much that is. It may hold more than
    /// that, which has to be cut off.
    fn beginning(&mut self, of: &Sequence) -> (SeqId, usize) {
        let had = self.longest(of).map_or(0, |there| there.length);
        if let Some(restored) = self.restored(of, had + WORTH_READING) {
            return restored;
        }
        // Looked up again: room for a session that then could not be read may have cost it.
        match self.longest(of) {
            // What the kept sequence is the beginning of takes its place, unless it may be wanted as it is again.
            Some(There { place, length, ends_there: true }) if !self.whole => {
                self.kept.take(place);
                (place, length)
            }
            Some(There { place, length, .. }) => (self.share(place, of, length), length),
            None => (self.free_place(), 0),
        }
    }

    /// The longest beginning of a sequence that the context holds, kept or of a request that runs.
    fn longest(&mut self, of: &Sequence) -> Option<There> {
        let whole = self.whole;
        // An image or audio counts as a whole, and a state that cannot be cut must not end in the middle of one.
        let usable = |length: usize| match of.layout.whole(length) {
            cut if whole && cut < length => 0,
            cut => cut,
        };
        let kept = self.kept.best(&of.tokens).map(|(entry, length)| There {
            place: entry.sequence,
            length: usable(length),
            ends_there: usable(length) == entry.tokens.len(),
        });
        let of_running = |other: &Sequence| {
            let length = usable(reusable(&other.tokens[..other.computed], &of.tokens, whole));
            Some(There { place: other.place?, length, ends_there: false })
        };
        let running = self.running.iter().filter_map(of_running);
        running.chain(kept).filter(|there| there.length > 0).max_by_key(|there| there.length)
    }

    /// A place with a beginning of a sequence from disk, where that is worth it.
    fn restored(&mut self, of: &Sequence, least: usize) -> Option<(SeqId, usize)> {
        let sessions = self.sessions.as_mut()?;
        let n_ctx = self.context.n_ctx() as usize;
        let (session, length) = sessions.best(&of.tokens, n_ctx)?;
        let cut = of.layout.whole(length);
        if cut < least || self.whole && cut < length {
            return None;
        }
        if !self.clear_room(session.tokens()) {
            return None;
        }
        let place = self.free_place();
        if self.sessions.as_mut()?.restore(&session, &mut self.context, place) {
            return Some((place, cut));
        }
        self.forget(Some(place));
        None
    }

    /// Lets what is kept leave until there is surely room for so many tokens. Returns false, and lets nothing leave,
    /// where those who run leave too little.
    fn clear_room(&mut self, tokens: usize) -> bool {
        let n_ctx = self.context.n_ctx() as usize;
        let needed = tokens + self.running.iter().map(|sequence| sequence.computed).sum::<usize>();
        if needed > n_ctx {
            return false;
        }
        while needed + self.kept.tokens() > n_ctx
            && let Some(entry) = self.kept.take_oldest()
        {
            self.store(&entry);
            self.forget(Some(entry.sequence));
        }
        true
    }

    /// A sequence of the context that begins with the first `length` tokens of `from`, which are also those of `of`.
    fn share(&mut self, from: SeqId, of: &Sequence, length: usize) -> SeqId {
        let to = self.free_place();
        self.context.share(from, to, of.layout.position(length));
        to
    }

    /// A sequence of the context that holds nothing; for that, the oldest of what is kept has to leave.
    fn free_place(&mut self) -> SeqId {
        if self.free.is_empty()
            && let Some(entry) = self.kept.take_oldest()
        {
            self.store(&entry);
            self.forget(Some(entry.sequence));
        }
        self.free.pop().expect("there are more sequences than requests run, and all others are kept")
    }

    /// One step: the next token of all that write, a part of the prompts of all that read.
    fn step(&mut self, stopping: &CancellationToken, someone_comes: &dyn Fn() -> bool) {
        let mut parts = self.plan();
        let prompts: usize = parts.iter().filter(|part| part.tokens > 1).map(|part| part.tokens).sum();
        self.fill(&mut parts);
        let started = Instant::now();
        let is_first_so_large = self.growth.grows(self.batch.len());
        // A step of one sequence touches no other's state; one of several may be moving recurrent states of others,
        // kept ones too, and has to come to its end.
        let may_stop = !self.whole || parts.len() == 1;
        let alone = self.is_alone();
        let stop = || {
            may_stop && (stopping.is_cancelled() || parts.iter().all(|part| self.running[part.at].unread()))
                || alone && self.pace.gives_up(prompts, started.elapsed()) && someone_comes()
        };
        let stepped = runtime::computing(self.threads, self.growth, self.batch.len(), |threads| {
            self.context.set_threads(threads);
            self.context.decode(&self.batch, &stop)
        });
        match stepped {
            Ok(Step::Done) => {
                if prompts > 0 {
                    let took = (!is_first_so_large).then(|| started.elapsed());
                    self.pace.note(self.batch.len(), took, alone);
                }
                self.go_on(&parts);
            }
            Ok(Step::Full) => self.make_room(),
            Ok(Step::Stopped) => self.stopped(&parts),
            Err(error) => self.failed(&parts, &error),
        }
    }

    /// How many tokens of each sequence go into the next step. Embeddings of images and audio have steps of their own, by turns
    /// with those of text.
    fn plan(&mut self) -> Vec<Part> {
        let looks = self.running.iter().position(Sequence::looks);
        let has_text = self.running.iter().any(|sequence| !sequence.looks());
        if let Some(at) = looks.filter(|_| !(self.looked && has_text)) {
            self.looked = true;
            return vec![self.look(at)];
        }
        self.looked = false;
        let text = || self.running.iter().enumerate().filter(|(_, sequence)| !sequence.looks());
        let reads = |sequence: &Sequence| sequence.pending() > 1;
        let pending: Vec<usize> = text()
            .filter(|(_, sequence)| reads(sequence))
            .map(|(_, sequence)| sequence.pending().min(sequence.next_mark() - sequence.computed))
            .collect();
        let writers = text().count() - pending.len();
        let budget = self.pace.tokens(pending.iter().sum(), self.is_alone(), writers);
        let mut reading = split(&pending, budget).into_iter();
        let part = |(at, sequence): (usize, &Sequence)| {
            let tokens = if reads(sequence) { reading.next().unwrap_or(0) } else { 1 };
            Part { at, tokens, row: None }
        };
        text().map(part).filter(|part| part.tokens > 0).collect()
    }

    /// A part of the image or audio that comes next in a sequence; all of it, where each of its embeddings attends to all.
    fn look(&self, at: usize) -> Part {
        let tokens = match self.running[at].next() {
            Next::Embedded { embedded, done } if embedded.is_causal() => {
                let pending = embedded.len() - done;
                pending.min(self.pace.tokens(pending, self.is_alone(), 0))
            }
            Next::Embedded { embedded, .. } => embedded.len(),
            Next::Tokens(_) => 0,
        };
        Part { at, tokens, row: None }
    }

    /// Whether there is one request and no other.
    fn is_alone(&self) -> bool {
        self.running.len() == 1 && self.waiting.is_empty()
    }

    fn fill(&mut self, parts: &mut [Part]) {
        self.batch.clear();
        for part in parts {
            let sequence = &self.running[part.at];
            let Some(place) = sequence.place else { continue };
            let end = sequence.computed + part.tokens;
            if let Next::Embedded { embedded, done } = sequence.next() {
                // Of a grid, all have the position of its first.
                let from = sequence.layout.position(sequence.computed - done);
                let chooses = end == sequence.tokens.len();
                part.row = self.batch.push_embedded(embedded, done..done + part.tokens, from, place, chooses);
                continue;
            }
            for position in sequence.computed..end {
                let chooses = position + 1 == sequence.tokens.len();
                let stands_at = sequence.layout.position(position);
                let row = self.batch.push(sequence.tokens[position], stands_at, place, chooses);
                part.row = chooses.then_some(row);
            }
        }
    }

    /// After a step: the sequences have come further, and those that are complete choose their next token.
    fn go_on(&mut self, parts: &[Part]) {
        let n_ctx = self.context.n_ctx() as usize;
        let mut over = Vec::new();
        for part in parts {
            let sequence = &mut self.running[part.at];
            sequence.computed += part.tokens;
            if sequence.marks.contains(&sequence.computed) {
                let (place, computed) = (sequence.place, sequence.computed);
                self.mark(part.at, place, computed);
            }
            let Some(row) = part.row else { continue };
            let sequence = &mut self.running[part.at];
            let goes = match self.context.logits(row) {
                Ok(scores) => sequence.choose(self.loaded, scores, n_ctx),
                Err(error) => sequence.fail(error.into()),
            };
            if goes != Goes::On {
                over.push(part.at);
            }
        }
        for at in over.into_iter().rev() {
            let sequence = self.running.remove(at);
            self.keep(sequence);
            self.full = false;
        }
    }

    /// Leaves a copy of a sequence as it is now, for others to begin with.
    fn mark(&mut self, at: usize, place: Option<SeqId>, computed: usize) {
        let tokens = self.running[at].tokens[..computed].to_vec();
        let Some(place) = place else { return };
        let copy = self.free_place();
        self.context.share(place, copy, self.running[at].layout.position(computed));
        for superfluous in self.kept.insert(Entry { sequence: copy, tokens }) {
            self.forget(Some(superfluous.sequence));
        }
    }

    /// Keeps what a sequence has computed.
    fn keep(&mut self, mut sequence: Sequence) {
        let Some(place) = sequence.place else { return };
        sequence.tokens.truncate(sequence.computed);
        if sequence.tokens.is_empty() {
            return self.forget(Some(place));
        }
        for superfluous in self.kept.insert(Entry { sequence: place, tokens: sequence.tokens }) {
            self.forget(Some(superfluous.sequence));
        }
    }

    /// The context is full: what is kept leaves first, then whoever was let in last, to go on later with what is on disk of
    /// it. A sequence that is alone and has no room ends.
    fn make_room(&mut self) {
        if let Some(entry) = self.kept.take_oldest() {
            self.store(&entry);
            return self.forget(Some(entry.sequence));
        }
        let Some(mut last) = self.running.pop() else { return };
        if self.running.is_empty() {
            if last.writes() {
                last.end(FinishReason::Length);
            } else {
                last.fail(
                    Error::PromptTooLong { tokens: last.tokens.len(), n_ctx: self.context.n_ctx() }.into(),
                );
            }
            return self.keep(last);
        }
        if let Some(sequence) = last.place.take() {
            self.store(&Entry { sequence, tokens: last.tokens[..last.computed].to_vec() });
            self.forget(Some(sequence));
        }
        last.computed = 0;
        self.full = true;
        self.waiting.push_front(last);
    }

    /// A step was stopped, because nobody reads any of its sequences, the engine is to end or another request comes.
    /// Their tokens were not added; a recurrent state is spoilt.
    fn stopped(&mut self, parts: &[Part]) {
        for part in parts.iter().rev() {
            let unread = self.running[part.at].unread();
            if !self.whole && !unread {
                self.pace.gave_up();
                continue;
            }
            let sequence = self.running.remove(part.at);
            self.full = false;
            if self.whole {
                self.forget(sequence.place);
            } else {
                self.keep(sequence);
            }
        }
    }

    /// A step failed: so do all of its sequences, because nobody knows whose fault it was. Recurrent states of others may
    /// have been moved by halves.
    fn failed(&mut self, parts: &[Part], error: &Error) {
        tracing::error!(model = %self.loaded.path().display(), %error, "a step failed");
        let reason = error.to_string();
        for part in parts.iter().rev() {
            let sequence = self.running.remove(part.at);
            sequence.fail(Error::Compute { reason: reason.clone() }.into());
            self.forget(sequence.place);
        }
        if self.whole {
            for entry in self.kept.take_all() {
                self.forget(Some(entry.sequence));
            }
            while let Some(mut sequence) = self.running.pop() {
                self.forget(sequence.place.take());
                sequence.computed = 0;
                self.waiting.push_front(sequence);
            }
        }
        self.full = false;
    }

    fn forget(&mut self, place: Option<SeqId>) {
        if let Some(place) = place {
            self.context.forget(place);
            self.free.push(place);
        }
    }

    fn store(&mut self, entry: &Entry) {
        if let Some(sessions) = &mut self.sessions {
            sessions.store(&self.context, entry.sequence, &entry.tokens);
        }
    }
}

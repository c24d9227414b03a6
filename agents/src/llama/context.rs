//! llama.cpp's context. The binding's own has no way to stop a step, to change the threads, to set several adapters, or
//! to read a classification head's result in its right length; this one has just what the engines need.

#![expect(unsafe_code, reason = "calls into llama.cpp; every block says why it is sound")]

use std::ffi::{CString, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;
use sarai_core::config::KvCacheType;

use super::load::Loaded;
use super::log;
use super::multimodal::Embedded;
use super::runtime;
use crate::Error;

/// A sequence of tokens in a context, by its number from 0.
pub(super) type SeqId = i32;

/// What a context is made for.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// Tokens that all sequences together may hold.
    pub(super) n_ctx: u32,
    /// Tokens in one step.
    pub(super) n_batch: u32,
    /// Sequences.
    pub(super) n_seq: u32,
    /// Tokens of a step whose scores are read; `None` is all.
    pub(super) n_outputs: Option<u32>,
    pub(super) threads: usize,
    pub(super) kv_cache_type: KvCacheType,
    /// How the results of a text's tokens become the text's; `None` where tokens are generated.
    pub(super) pooling: Option<Pooling>,
    /// Whether the model has no scores of its vocabulary: it is an encoder.
    pub(super) scoreless: bool,
}

/// How the results of a text's tokens become the text's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pooling {
    /// As the model says.
    Own,
    /// Their mean.
    Mean,
    /// Scores of the classification head.
    Rank,
}

/// Whether the room for scores is this process's plain memory. With a GPU it may be the driver's.
const KEEPS_SCORES: bool = !cfg!(any(feature = "cuda", feature = "metal", feature = "vulkan"));

fn ggml_type(kind: KvCacheType) -> sys::ggml_type {
    match kind {
        KvCacheType::F32 => sys::GGML_TYPE_F32,
        KvCacheType::F16 => sys::GGML_TYPE_F16,
        KvCacheType::Bf16 => sys::GGML_TYPE_BF16,
        KvCacheType::Q8_0 => sys::GGML_TYPE_Q8_0,
        KvCacheType::Q5_1 => sys::GGML_TYPE_Q5_1,
        KvCacheType::Q5_0 => sys::GGML_TYPE_Q5_0,
        KvCacheType::Iq4Nl => sys::GGML_TYPE_IQ4_NL,
        KvCacheType::Q4_1 => sys::GGML_TYPE_Q4_1,
        KvCacheType::Q4_0 => sys::GGML_TYPE_Q4_0,
    }
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Done,
    /// There is no room for its tokens; nothing has changed.
    Full,
    /// It was stopped. Its tokens are not in the context. Recurrent states must be forgotten: its own, and where it had
    /// several sequences those of all others, because it may have been moving them.
    Stopped,
}

/// A context of a loaded model. It stays on the thread that made it.
pub(super) struct Context<'m> {
    raw: NonNull<sys::llama_context>,
    loaded: &'m Loaded,
    adapters: Vec<NonNull<sys::llama_adapter_lora>>,
    /// Whether the next step is planned anew, for which the adapters of all contexts of the model are looked at.
    plans_again: bool,
    /// Whether an embedding's position has four axes, as with M-RoPE.
    four_axes: bool,
    pool: Option<NonNull<sys::ggml_threadpool>>,
    not_send: PhantomData<*mut ()>,
}

impl<'m> Context<'m> {
    /// Makes a context; `None` where llama.cpp cannot, for example because memory is short.
    pub(super) fn new(loaded: &'m Loaded, shape: &Shape) -> Option<Self> {
        // SAFETY: a plain function that returns a struct of defaults.
        let mut params = unsafe { sys::llama_context_default_params() };
        let threads = i32::try_from(shape.threads).unwrap_or(1);
        params.n_ctx = shape.n_ctx.max(shape.n_batch);
        params.n_batch = shape.n_batch;
        params.n_ubatch = shape.n_batch;
        params.n_seq_max = shape.n_seq;
        params.n_outputs_max = shape.n_outputs.unwrap_or(0);
        let kind = ggml_type(shape.kv_cache_type);
        (params.type_k, params.type_v) = (kind, kind);
        params.n_threads = threads;
        params.n_threads_batch = threads;
        params.no_perf = true;
        // One room for all sequences: one may take it all, and a common beginning is held once.
        params.kv_unified = true;
        // A sliding window would forget what a later request may want to begin with.
        params.swa_full = true;
        params.embeddings = shape.pooling.is_some();
        match shape.pooling {
            Some(Pooling::Mean) => params.pooling_type = sys::LLAMA_POOLING_TYPE_MEAN,
            Some(Pooling::Rank) => params.pooling_type = sys::LLAMA_POOLING_TYPE_RANK,
            Some(Pooling::Own) | None => {}
        }
        // SAFETY: llama.cpp was started when the model was loaded, the model outlives the context by its lifetime, and
        // the lock keeps others from changing the model meanwhile, which making a context may do.
        let raw = loaded.changing(|model| unsafe { sys::llama_init_from_model(model.as_ptr(), params) });
        // SAFETY: the model is live.
        let rope = unsafe { sys::llama_model_rope_type(loaded.raw().as_ptr()) };
        let mut context = Self {
            raw: NonNull::new(raw)?,
            loaded,
            adapters: Vec::new(),
            plans_again: false,
            four_axes: matches!(rope, sys::LLAMA_ROPE_TYPE_MROPE | sys::LLAMA_ROPE_TYPE_IMROPE),
            pool: None,
            not_send: PhantomData,
        };
        if !runtime::gnu_openmp() {
            context.attach_pool(shape.threads);
        }
        if shape.scoreless && KEEPS_SCORES {
            context.give_back_scores(shape.n_batch as usize)?;
        }
        Some(context)
    }

    /// llama.cpp has room for a score of each token of the vocabulary at each token of a step, for a model that never has
    /// any, too, and fills it with zeros: 1 MB a token for EmbeddingGemma. This makes it take that room now, in a step of
    /// `tokens` that is stopped at once, and gives the pages back; they stay zeros, which nobody reads.
    fn give_back_scores(&mut self, tokens: usize) -> Option<()> {
        let mut batch = Batch::default();
        for position in 0..tokens {
            batch.push(LlamaToken(0), position, 0, true);
        }
        self.decode(&batch, &|| true).ok()?;
        self.forget(0);
        #[cfg(target_os = "linux")]
        {
            let n_vocab = usize::try_from(self.loaded.model().vocab().n_tokens()).ok()?;
            // SAFETY: the context is live.
            let scores = unsafe { sys::llama_get_logits(self.raw.as_ptr()) };
            if scores.is_null() {
                return Some(());
            }
            let (page, start) = (rustix::param::page_size(), scores.addr());
            let (from, to) =
                (start.next_multiple_of(page), (start + tokens * n_vocab * size_of::<f32>()) / page * page);
            if from < to {
                // SAFETY: whole pages within the room for `tokens` scores of the vocabulary, which the step above has made
                // and which is plain memory of the C library's (see `KEEPS_SCORES`). They hold zeros and will again.
                let given = unsafe {
                    let pages = scores.byte_add(from - start).cast();
                    rustix::mm::madvise(pages, to - from, rustix::mm::Advice::LinuxDontNeed)
                };
                if let Err(error) = given {
                    tracing::warn!(%error, "memory for scores that no encoder has could not be given back");
                }
            }
        }
        Some(())
    }

    /// Without OpenMP: threads of its own that sleep between steps, instead of new ones for every step, which poll.
    fn attach_pool(&mut self, threads: usize) {
        // SAFETY: a plain function that returns a struct of defaults.
        let mut params = unsafe { sys::ggml_threadpool_params_default(i32::try_from(threads).unwrap_or(1)) };
        params.poll = 0;
        // SAFETY: the parameters live through the call, and the pool until after the context (see `drop`).
        self.pool = NonNull::new(unsafe { sys::ggml_threadpool_new(&raw mut params) });
        if let Some(pool) = self.pool {
            // SAFETY: both pointers are live.
            unsafe { sys::llama_attach_threadpool(self.raw.as_ptr(), pool.as_ptr(), pool.as_ptr()) };
        }
    }

    /// Tokens that it has room for: a little more than was asked for.
    pub(super) fn n_ctx(&self) -> u32 {
        // SAFETY: the context is live.
        unsafe { sys::llama_n_ctx(self.raw.as_ptr()) }
    }

    /// Puts adapters on the model's weights, for this context alone, each with its scale.
    pub(super) fn set_adapters(&mut self, files: &[(std::path::PathBuf, f32)]) -> Result<(), Error> {
        let mut scales = Vec::new();
        for (path, scale) in files {
            let bad = || Error::BadAdapter { path: path.clone(), model: self.loaded.path().to_owned() };
            let file = c_path(path).ok_or_else(bad)?;
            // SAFETY: the model is live and nobody else changes it meanwhile; the path is a C string.
            let raw = self
                .loaded
                .changing(|model| unsafe { sys::llama_adapter_lora_init(model.as_ptr(), file.as_ptr()) });
            self.adapters.push(NonNull::new(raw).ok_or_else(bad)?);
            scales.push(*scale);
        }
        if self.adapters.is_empty() {
            return Ok(());
        }
        let mut adapters: Vec<_> = self.adapters.iter().map(|adapter| adapter.as_ptr()).collect();
        // SAFETY: both arrays have the length that is said; the adapters live as long as this context.
        let code = unsafe {
            sys::llama_set_adapters_lora(
                self.raw.as_ptr(),
                adapters.as_mut_ptr(),
                adapters.len(),
                scales.as_mut_ptr(),
            )
        };
        self.plans_again = true;
        match code {
            0 => Ok(()),
            code => Err(compute(format!("llama_set_adapters_lora gave {code}"))),
        }
    }

    /// The threads that later steps use.
    pub(super) fn set_threads(&mut self, threads: usize) {
        let threads = i32::try_from(threads).unwrap_or(1);
        // SAFETY: the context is live.
        unsafe { sys::llama_set_n_threads(self.raw.as_ptr(), threads, threads) };
    }

    /// Computes a batch. `stop` is asked many times while it is computed, from this thread; when it says so, the step
    /// ends within the operation that it is in.
    pub(super) fn decode(&mut self, batch: &Batch, stop: &dyn Fn() -> bool) -> Result<Step, Error> {
        unsafe extern "C" fn asked(stop: *mut c_void) -> bool {
            // SAFETY: `stop` is the pointer given below, which lives until the callback is taken away again.
            let stop = unsafe { &*stop.cast::<&dyn Fn() -> bool>() };
            let stops = stop();
            if stops {
                log::step_is_stopped(true);
            }
            stops
        }
        let mut n_seq = vec![1_i32; batch.len()];
        let mut sequences: Vec<*mut SeqId> =
            batch.sequences.iter().map(|id| std::ptr::from_ref(id).cast_mut()).collect();
        let axes;
        let (token, embd, pos) = if batch.embeddings.is_empty() {
            (batch.tokens.as_ptr().cast_mut().cast(), std::ptr::null_mut(), batch.positions.as_ptr())
        } else {
            axes = batch.axes(self.four_axes);
            (std::ptr::null_mut(), batch.embeddings.as_ptr().cast_mut(), axes.as_ptr())
        };
        let raw_batch = sys::llama_batch {
            n_tokens: i32::try_from(batch.len()).map_err(compute)?,
            token,
            embd,
            pos: pos.cast_mut(),
            n_seq_id: n_seq.as_mut_ptr(),
            seq_id: sequences.as_mut_ptr(),
            logits: batch.outputs.as_ptr().cast_mut(),
        };
        let raw = self.raw.as_ptr();
        // SAFETY: all arrays of the batch have `n_tokens` entries (positions of embeddings four times as many where they have
        // four axes, embeddings a row of the model's width for each, see `Batch::push_embedded`) and outlive the call;
        // llama.cpp only reads them. `LlamaToken` is a transparent `llama_token`. The callback's data outlives the time for
        // which it is set: the CPU computes within the call.
        let compute = || unsafe {
            let data = std::ptr::from_ref(&stop).cast_mut().cast();
            sys::llama_set_abort_callback(raw, Some(asked), data);
            if batch.sees_all {
                sys::llama_set_causal_attn(raw, false);
            }
            let code = sys::llama_decode(raw, raw_batch);
            if batch.sees_all {
                sys::llama_set_causal_attn(raw, true);
            }
            sys::llama_set_abort_callback(raw, None, std::ptr::null_mut());
            log::step_is_stopped(false);
            code
        };
        let code = if std::mem::take(&mut self.plans_again) {
            self.loaded.changing(|_| compute())
        } else {
            compute()
        };
        match code {
            0 => Ok(Step::Done),
            1 => Ok(Step::Full),
            2 => Ok(Step::Stopped),
            code => Err(self::compute(format!("llama_decode gave {code}"))),
        }
    }

    /// The scores of the whole vocabulary after the batch's token at `row`, which was an output.
    pub(super) fn logits(&self, row: usize) -> Result<&[f32], Error> {
        let n_vocab = usize::try_from(self.loaded.model().vocab().n_tokens()).unwrap_or(0);
        let row = i32::try_from(row).map_err(compute)?;
        // SAFETY: the context is live; a row that is no output gives null.
        let scores = unsafe { sys::llama_get_logits_ith(self.raw.as_ptr(), row) };
        if scores.is_null() {
            return Err(compute("there are no scores"));
        }
        // SAFETY: llama.cpp keeps one score for each token of the vocabulary there until the next step.
        Ok(unsafe { std::slice::from_raw_parts(scores, n_vocab) })
    }

    /// The pooled result of a sequence of the last batch.
    pub(super) fn pooled(&self, sequence: SeqId) -> Result<&[f32], Error> {
        let model = self.loaded.model();
        // SAFETY: the context is live.
        let pooling = unsafe { sys::llama_pooling_type(self.raw.as_ptr()) };
        let length = if pooling == sys::LLAMA_POOLING_TYPE_RANK {
            model.n_cls_out() as usize
        } else {
            usize::try_from(model.n_embd_out()).unwrap_or(0)
        };
        // SAFETY: the context is live; a sequence that was not in the batch gives null.
        let result = unsafe { sys::llama_get_embeddings_seq(self.raw.as_ptr(), sequence) };
        if result.is_null() {
            return Err(compute("there is no pooled result"));
        }
        // SAFETY: llama.cpp keeps a result of this length, which depends on the pooling, until the next step.
        Ok(unsafe { std::slice::from_raw_parts(result, length) })
    }

    /// Forgets a sequence.
    pub(super) fn forget(&mut self, sequence: SeqId) {
        self.cut(sequence, 0);
    }

    /// Forgets a sequence from a position on. Returns whether that was possible: a recurrent state cannot go back.
    pub(super) fn cut(&mut self, sequence: SeqId, from: usize) -> bool {
        let from = i32::try_from(from).unwrap_or(i32::MAX);
        self.memory(|memory| {
            // SAFETY: the memory is that of a live context; a sequence that it does not have is refused.
            unsafe { sys::llama_memory_seq_rm(memory, sequence, from, -1) }
        })
        .unwrap_or(true)
    }

    /// Lets the empty sequence `to` begin with the first `length` tokens of `from`. Nothing is copied but recurrent
    /// states, of which there is only the one at the end of `from`.
    pub(super) fn share(&mut self, from: SeqId, to: SeqId, length: usize) {
        let length = i32::try_from(length).unwrap_or(i32::MAX);
        self.memory(|memory| {
            // SAFETY: the memory is that of a live context, and both sequences are below its number of sequences.
            unsafe { sys::llama_memory_seq_cp(memory, from, to, 0, length) };
        });
    }

    /// How large a sequence is when it is written.
    pub(super) fn saved_bytes(&self, sequence: SeqId) -> u64 {
        // SAFETY: the context is live.
        unsafe { sys::llama_state_seq_get_size(self.raw.as_ptr(), sequence) as u64 }
    }

    /// Writes a sequence to a file.
    pub(super) fn save(&self, sequence: SeqId, tokens: &[LlamaToken], path: &Path) -> Result<(), Error> {
        let failed = || compute("the state could not be written");
        let path = c_path(path).ok_or_else(failed)?;
        // SAFETY: the context is live, the path is a C string, and the tokens are as many as said.
        let written = unsafe {
            sys::llama_state_seq_save_file(
                self.raw.as_ptr(),
                path.as_ptr(),
                sequence,
                tokens.as_ptr().cast(),
                tokens.len(),
            )
        };
        if written == 0 { Err(failed()) } else { Ok(()) }
    }

    /// Reads a sequence of these tokens from a file that [`save`](Self::save) has written for the same model and
    /// settings, unchanged since.
    pub(super) fn restore(
        &mut self,
        sequence: SeqId,
        expected: &[LlamaToken],
        path: &Path,
    ) -> Result<(), Error> {
        let failed = || compute("the state could not be read");
        let path = c_path(path).ok_or_else(failed)?;
        let mut tokens = vec![LlamaToken(0); expected.len()];
        let mut count = 0;
        // SAFETY: the context is live, the path is a C string, there is room for as many tokens as said, and llama.cpp
        // writes no more than that.
        let read = unsafe {
            sys::llama_state_seq_load_file(
                self.raw.as_ptr(),
                path.as_ptr(),
                sequence,
                tokens.as_mut_ptr().cast(),
                tokens.len(),
                &raw mut count,
            )
        };
        if read == 0 || tokens.get(..count) != Some(expected) { Err(failed()) } else { Ok(()) }
    }

    fn memory<T>(&mut self, change: impl FnOnce(sys::llama_memory_t) -> T) -> Option<T> {
        // SAFETY: the context is live. One that has no memory, as an encoder's, gives null.
        let memory = unsafe { sys::llama_get_memory(self.raw.as_ptr()) };
        (!memory.is_null()).then(|| change(memory))
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: the context and its adapters are freed once, the adapters after the context that uses them and while
        // the model, which they belong to, is live and changed by nobody else; the threads after the context, too.
        self.loaded.changing(|_| unsafe {
            sys::llama_free(self.raw.as_ptr());
            for adapter in &self.adapters {
                sys::llama_adapter_lora_free(adapter.as_ptr());
            }
        });
        if let Some(pool) = self.pool {
            // SAFETY: the context that used it is gone.
            unsafe { sys::ggml_threadpool_free(pool.as_ptr()) };
        }
    }
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("n_ctx", &self.n_ctx()).finish_non_exhaustive()
    }
}

/// The tokens of a step, or the embeddings of one image or audio in their place: never both.
#[derive(Debug, Default)]
pub(super) struct Batch {
    tokens: Vec<LlamaToken>,
    /// One after another, a row of the model's width each.
    embeddings: Vec<f32>,
    /// Of an embedding, along the time axis.
    positions: Vec<i32>,
    /// Of embeddings, along the other three axes.
    other_axes: [Vec<i32>; 3],
    sequences: Vec<SeqId>,
    outputs: Vec<i8>,
    /// Whether each of the embeddings attends to all others of the batch, later ones too.
    sees_all: bool,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.tokens.clear();
        self.embeddings.clear();
        self.positions.clear();
        self.other_axes.iter_mut().for_each(Vec::clear);
        self.sequences.clear();
        self.outputs.clear();
        self.sees_all = false;
    }

    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Makes the empty batch one of embeddings: those at `part` of what stands in for an image or audio, whose first one has
    /// this position in a sequence. Where `last_is_output`, the last of them is an output; its row is given back.
    pub(super) fn push_embedded(
        &mut self,
        embedded: &Embedded,
        part: Range<usize>,
        position: usize,
        sequence: SeqId,
        last_is_output: bool,
    ) -> Option<usize> {
        let position = i32::try_from(position).unwrap_or(i32::MAX);
        self.embeddings.extend_from_slice(embedded.rows(part.clone()));
        for at in part.clone() {
            let [time, others @ ..] = embedded.axes(at, position);
            self.positions.push(time);
            for (axis, of_this) in self.other_axes.iter_mut().zip(others) {
                axis.push(of_this);
            }
            self.sequences.push(sequence);
            self.outputs.push(i8::from(last_is_output && at + 1 == part.end));
        }
        self.sees_all = !embedded.is_causal();
        last_is_output.then(|| self.len() - 1)
    }

    /// The positions of embeddings as llama.cpp wants them: axis after axis.
    fn axes(&self, four: bool) -> Vec<i32> {
        let others = if four { self.other_axes.as_slice() } else { &[] };
        self.positions.iter().chain(others.iter().flatten()).copied().collect()
    }

    /// Adds a token at a position of a sequence. Returns its row, by which an output is read.
    pub(super) fn push(
        &mut self,
        token: LlamaToken,
        position: usize,
        sequence: SeqId,
        output: bool,
    ) -> usize {
        self.tokens.push(token);
        self.positions.push(i32::try_from(position).unwrap_or(i32::MAX));
        self.sequences.push(sequence);
        self.outputs.push(i8::from(output));
        self.tokens.len() - 1
    }
}

/// A failure of llama.cpp's while it computes.
pub(super) fn compute(error: impl fmt::Display) -> Error {
    Error::Compute { reason: error.to_string() }
}

pub(super) fn c_path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_encoded_bytes()).ok()
}

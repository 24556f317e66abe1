//! InfLLM: Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an
//! Efficient Context Memory", arXiv 2402.04617.

mod block_index;
mod chunk;
mod received;
mod settings;
mod state;
mod unrotated_rows;

use crate::sequences::Sequences;
use crate::storage::{check_lse, check_store, fork, lse_with_sink_logits, marks, restore};
use crate::sub_batch::{SubBatch, assemble};
use candle_core::Tensor;
use longctx_core::{
    AttentionState, Batch, Error, Footprint, KvCache, KvStore, LayerSpec, Mark, Result, SeqId,
    Step, attention, check_unseen,
};
pub use settings::InfLlmSettings;
use settings::Sizes;
use state::SeqState;
use unrotated_rows::UnrotatedRows;

/// A cache that drops nothing: queries see the first tokens, a local window, and a few retrieved
/// blocks of the past.
///
/// The past is divided into blocks. A block is represented by the tokens that received the most
/// attention from the local windows of later queries. Each chunk of queries retrieves the blocks
/// whose representatives have the largest product with its mean query, the same for all heads. Keys
/// outside the window are treated as if at distance `local - 1`, so positions never exceed those
/// that the model was trained on. Tokens that have left the window but do not yet fill a block are
/// visible too.
///
/// Two stores of any kind, packed ones included, hold a sequence:
///
/// - `past` holds all tokens, with unrotated keys.
/// - `window` holds the newest `local` tokens, and up to 256 more during decoding, with rotated
///   keys.
///
/// The tokens of the window are held twice, and [`footprint`](KvCache::footprint) counts them
/// twice. Outside the stores there are, for each query head, a mean key in f32 for each block, and
/// a number for each token of the window.
///
/// Recently retrieved blocks are resident; the others could be held in slower memory. On a CPU
/// both are in the same memory and nothing is copied: [`footprint`](KvCache::footprint) counts
/// everything, and [`resident_footprint`](InfLlm::resident_footprint) the part that an accelerator
/// would have to hold.
///
/// A prompt is processed in chunks, each of which sees only the tokens above. With
/// [`with_exact_prompt`](InfLlm::with_exact_prompt) a sequence's first call has exact attention
/// instead.
///
/// [`truncate`](KvCache::truncate) to a length above 0 is an error, because the attention of every
/// query has been accumulated. `len` 0 restarts the text.
///
/// If a call of several chunks fails after its first chunk, its sequences are poisoned, because the
/// window has already dropped tokens. This happens if a window's pool of fixed capacity is full.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{
///     AttentionShape, Batch, DenseStore, KvCache, LayerSpec, Rope, RopeScaling, Step,
/// };
/// use token_drop::{InfLlm, InfLlmSettings};
///
/// let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None)?);
/// let spec = LayerSpec::new(AttentionShape::new(8, 2, 64)?).with_rope(rope);
/// let store = || DenseStore::new(spec.shape, DType::F16);
/// let sizes = InfLlmSettings {
///     init: 4, local: 64, block: 16, top_blocks: 2, resident_blocks: 4, representatives: 2, chunk: 32,
/// };
/// let mut cache = InfLlm::new(spec.clone(), store()?, store()?, sizes)?;
/// let batch = Batch::single(0, 400)?;
/// let q = Tensor::randn(0f32, 1., (400, 8, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1., (400, 2, 64), &Device::Cpu)?;
/// cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &k })?;
/// // 400 tokens: 4 first ones, 64 in the window, the others in 20 blocks of 16 and a remainder.
/// assert_eq!(cache.blocks(0), 20);
/// let (resident, all) = (cache.resident_footprint(), cache.footprint());
/// assert!(resident.payload < all.payload / 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct InfLlm<S, W = S> {
    spec: LayerSpec,
    sizes: Sizes,
    exact_prompt: bool,
    published_remainder: bool,
    /// All tokens, with unrotated keys.
    past: S,
    /// The newest tokens, with rotated keys.
    window: W,
    sequences: Sequences<SeqState>,
}

impl<S: KvStore, W: KvStore> InfLlm<S, W> {
    /// Creates a cache with fixed sizes.
    ///
    /// # Errors
    /// [`Error::Setting`] for inconsistent sizes, a store that is not empty, or a layer without a
    /// rotary embedding; [`Error::Mismatch`] if a store was made for another shape;
    /// [`Error::Unsupported`] if the layer has a sliding window.
    pub fn new(spec: LayerSpec, past: S, window: W, sizes: InfLlmSettings) -> Result<Self> {
        sizes.check()?;
        Self::with_sizes(spec, past, window, Sizes::Fixed(sizes))
    }

    /// Creates a cache whose sizes are [a ratio](InfLlmSettings::of_prompt) of the prompt.
    ///
    /// [`expect_prompt`](Self::expect_prompt) sets a prompt's length in advance. Otherwise the
    /// sizes grow with the prompt. The first tokens are then fixed when the first block is filled,
    /// and the window is enlarged by the difference.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Setting`] unless the ratio lies between 0 and 1.
    pub fn with_ratio(spec: LayerSpec, past: S, window: W, ratio: f64) -> Result<Self> {
        InfLlmSettings::of_prompt(ratio, 1)?;
        Self::with_sizes(spec, past, window, Sizes::Ratio(ratio))
    }

    fn with_sizes(spec: LayerSpec, past: S, window: W, sizes: Sizes) -> Result<Self> {
        check_store(&spec, &past, "InfLLM")?;
        check_store(&spec, &window, "InfLLM")?;
        spec.require_rope("InfLLM")?;
        let (exact_prompt, published_remainder) = (false, false);
        let sequences = Sequences::default();
        Ok(Self { spec, sizes, exact_prompt, published_remainder, past, window, sequences })
    }

    /// Uses exact attention among the tokens of a sequence's first call, which is the whole prompt
    /// if it is fed in one call. Blocks are retrieved after it.
    #[must_use]
    pub fn with_exact_prompt(mut self) -> Self {
        self.exact_prompt = true;
        self
    }

    /// Masks the remainder as the published code does (thunlp/InfLLM,
    /// `get_global_hidden_and_mask`): all queries of a chunk see the tokens that leave the window
    /// within the chunk. Early queries see these twice, in the window and at the clipped distance.
    #[must_use]
    pub fn with_published_remainder(mut self) -> Self {
        self.published_remainder = true;
        self
    }

    /// Declares that the first `tokens` tokens of a sequence are its prompt, for sizes that are a
    /// ratio.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the sequence has that many tokens already.
    pub fn expect_prompt(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        self.sequences.expect_prompt(seq, tokens)
    }

    /// Returns the store of all tokens, with unrotated keys.
    pub fn past(&self) -> &S {
        &self.past
    }

    /// Returns the store of the newest tokens, with rotated keys.
    pub fn window(&self) -> &W {
        &self.window
    }

    /// Returns the current sizes of a sequence; `None` if it is unknown.
    pub fn sizes(&self, seq: SeqId) -> Option<InfLlmSettings> {
        self.state(seq).map(|state| state.sizes)
    }

    /// Returns the number of blocks of a sequence's past.
    pub fn blocks(&self, seq: SeqId) -> usize {
        self.state(seq).map_or(0, |state| state.blocks.len())
    }

    /// Returns the resident blocks of a sequence, in text order.
    pub fn resident(&self, seq: SeqId) -> Vec<usize> {
        self.state(seq).map_or(Vec::new(), |state| state.blocks.resident())
    }

    /// Returns the blocks that a sequence's newest chunk of queries retrieved, in text order.
    pub fn retrieved(&self, seq: SeqId) -> Vec<usize> {
        self.state(seq).map_or(Vec::new(), |state| state.blocks.retrieved())
    }

    fn state(&self, seq: SeqId) -> Option<&SeqState> {
        self.sequences.get(seq).map(|sequence| &sequence.state)
    }

    /// Returns the memory that an accelerator would have to hold: everything except the blocks that
    /// are not resident and the unrotated copies of the window. Their bytes are computed as their
    /// share of the past's entries.
    pub fn resident_footprint(&self) -> Footprint {
        let mut all = self.footprint();
        for (seq, sequence) in self.sequences.iter() {
            let (past, entries) = (self.past.seq_footprint(seq), self.past.len(seq).max(1));
            let away = sequence.state.offloadable(sequence.seen);
            all.payload -= past.payload * away / entries;
            all.scales -= past.scales * away / entries;
        }
        all
    }

    /// Appends the tokens of a call and attends with them, exact prompts first.
    fn append_and_attend(&mut self, step: &Step<'_>) -> Result<AttentionState> {
        let exact = |seq| self.exact_prompt && self.seen(seq) == 0;
        let prompts = SubBatch::of_sequences(step.batch, |seq, _| exact(seq))?;
        let others = SubBatch::of_sequences(step.batch, |seq, _| !exact(seq))?;
        let mut parts = Vec::new();
        if let Some(part) = &prompts {
            let rows = UnrotatedRows::of(part, step)?;
            let state = self.attend_exactly(&rows)?;
            self.process_chunks(&UnrotatedRows {
                exact_lse: Some(lse_with_sink_logits(&state, &self.spec)?),
                ..rows
            })?;
            parts.push((part, state));
        }
        if let Some(part) = &others {
            let state = self.process_chunks(&UnrotatedRows::of(part, step)?)?;
            parts.push((part, state.ok_or_else(missing_state)?));
        }
        assemble(&parts, step.batch.tokens())
    }

    /// Attention of new sequences' tokens among themselves.
    fn attend_exactly(&self, rows: &UnrotatedRows) -> Result<AttentionState> {
        let positions = rows.batch.positions(|_| 0);
        let q = self.spec.rotate(&rows.q, &positions)?;
        let k = self.spec.rotate(&rows.k, &positions)?;
        attention::attend(&rows.batch, &q, &k, &rows.v, &self.spec.shape)
    }

    /// Restores the state before a failed call, or poisons the sequences that cannot be restored.
    fn roll_back(&mut self, batch: &Batch, before: &Before, error: Error) -> Error {
        let advanced = |(seq, seen): (&SeqId, &usize)| self.sequences.seen(*seq) != *seen;
        let midway = batch.seqs().iter().zip(&before.seen).any(advanced);
        if midway || self.sequences.check(batch).is_err() {
            return self.sequences.poison(batch.seqs(), error);
        }
        let mut lost = restore(&mut self.past, batch, &before.past);
        lost.extend(restore(&mut self.window, batch, &before.window));
        for (&seq, mark) in batch.seqs().iter().zip(&before.past) {
            if mark.lens.is_empty() {
                self.sequences.forget(seq);
            }
        }
        self.sequences.poison(&lost, error)
    }

    fn before(&self, batch: &Batch) -> Before {
        Before {
            seen: batch.seqs().iter().map(|&seq| self.seen(seq)).collect(),
            past: marks(&self.past, batch),
            window: marks(&self.window, batch),
        }
    }
}

fn missing_state() -> Error {
    Error::mismatch("attention of a chunk", "a state", "none")
}

/// What a batch's sequences held before a call.
struct Before {
    seen: Vec<usize>,
    past: Vec<Mark>,
    window: Vec<Mark>,
}

impl<S: KvStore, W: KvStore> KvCache for InfLlm<S, W> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        self.sequences.check(step.batch)?;
        let before = self.before(step.batch);
        let out =
            self.append_and_attend(step).and_then(|state| self.spec.output(state, step.q.dtype()));
        out.map_err(|error| self.roll_back(step.batch, &before, error))
    }

    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        self.sequences.check(step.batch)?;
        check_unseen(self, step.batch)?;
        check_lse(step, lse, &self.spec)?;
        let rows = UnrotatedRows { exact_lse: lse.cloned(), ..UnrotatedRows::all(step) };
        let before = self.before(step.batch);
        let done = self.process_chunks(&rows);
        done.map_err(|error| self.roll_back(step.batch, &before, error)).map(drop)
    }

    fn needs_lse(&self) -> bool {
        true
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.sequences.check_fork(from, to)?;
        fork(&mut self.past, from, to)?;
        fork(&mut self.window, from, to).inspect_err(|_| {
            self.past.remove(to);
        })?;
        self.sequences.fork(from, to);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let sequence = self.sequences.check_truncate(seq, len)?;
        if len > 0 && len < sequence.seen {
            let what = "truncating a sequence of InfLLM, which sums the attention of every query";
            return Err(Error::Unsupported(what.into()));
        }
        Ok(())
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let Some(sequence) = self.sequences.get_mut(seq) else {
            return Err(Error::UnknownSequence(seq));
        };
        if len < sequence.seen {
            sequence.state =
                SeqState::new(self.sizes.of(sequence.prompt.truncated(0))?, &self.spec);
            sequence.truncate(0);
            self.past.truncate(seq, 0)?;
            self.window.truncate(seq, 0)?;
        }
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.past.remove(seq);
        self.window.remove(seq);
        self.sequences.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.sequences.ids()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.sequences.seen(seq)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.sequences.seen(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        let of_window = |(seq, own): (SeqId, std::ops::Range<usize>)| {
            let sizes = self.sizes.of(self.sequences.prompt_with(seq, own.len())).ok();
            let max = sizes.map_or(usize::MAX, |sizes| sizes.local + sizes.chunk);
            (seq, own.len().min(max))
        };
        let of_window: Vec<_> = batch.iter().map(of_window).collect();
        self.past.can_append(batch)
            && Batch::new(&of_window).is_ok_and(|batch| self.window.can_append(&batch))
    }

    fn footprint(&self) -> Footprint {
        let states = self.sequences.iter().map(|(_, sequence)| sequence.state.footprint());
        self.past.footprint() + self.window.footprint() + states.sum()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        let state = self.state(seq).map(SeqState::footprint).unwrap_or_default();
        self.past.seq_footprint(seq) + self.window.seq_footprint(seq) + state
    }

    fn clear(&mut self) {
        self.past.clear();
        self.window.clear();
        self.sequences.clear();
    }
}

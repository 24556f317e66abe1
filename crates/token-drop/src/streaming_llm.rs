//! StreamingLLM: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv
//! 2309.17453.

use std::collections::BTreeMap;

use crate::budget::check_ratio;
use crate::prompt::Prompt;
use crate::sequences::Sequences;
use crate::storage::{check_store, fork, marks, restore, truncate};
use crate::sub_batch::{SubBatch, assemble};
use candle_core::{DType, Tensor};
use longctx_core::{
    AttentionState, Batch, DenseStore, Error, Footprint, KvCache, KvStore, LayerSpec, Mark, Mask,
    Result, Selection, SeqId, Step, attention, check_unseen,
};

/// Share of sinks among the kept tokens, if a ratio of the prompt is kept (arXiv 2407.01527).
const SINK_RATIO: f64 = 0.021;
/// The smallest number of sinks for a ratio: that of the published code.
const MIN_SINKS: usize = 4;

/// Keeps the first tokens (attention sinks) and a window of the newest ones: constant memory for a
/// text of any length.
///
/// Positions are those *within the cache*: with 4 sinks and a window of 60, the newest token is
/// never past position 64. The published code rotates the whole window again for every token. This
/// is not necessary, because attention depends only on differences of positions:
///
/// - Keys of the window stay rotated at their original positions, and queries at theirs.
/// - Keys of the sinks stay at their first positions; queries are rotated to their position within
///   the cache.
///
/// The two parts of the attention are merged without loss. So the window may be in any store,
/// packed ones included; the few sinks have the dtype of the first keys.
///
/// A whole prompt in one call has exact attention; tokens are dropped afterwards.
///
/// [`truncate`](KvCache::truncate) is possible to 0 tokens and to any length since the last drop.
/// With [`with_step`](Self::with_step), these lengths go back up to a step.
///
/// In a pool of fixed capacity, dropping tokens from blocks that forks share needs room for copies.
/// Without that room, a later call drops them.
#[derive(Debug)]
pub struct StreamingLlm<S> {
    spec: LayerSpec,
    size: Size,
    step: usize,
    sinks: DenseStore,
    window: S,
    sequences: Sequences<SeqState>,
}

/// The state of a sequence outside the stores: the number of tokens seen when some were last
/// dropped.
#[derive(Debug, Clone, Default)]
struct SeqState {
    seen_at_drop: usize,
}

#[derive(Debug, Clone, Copy)]
enum Size {
    Tokens { sinks: usize, window: usize },
    Ratio(f64),
}

impl Size {
    /// Returns the number of sinks, and the number of kept tokens in total.
    fn of(self, prompt: Prompt) -> (usize, usize) {
        match self {
            Size::Tokens { sinks, window } => (sinks, sinks.saturating_add(window)),
            Size::Ratio(ratio) => {
                let kept = ((ratio * prompt.len() as f64) as usize).max(MIN_SINKS + 1);
                (((kept as f64 * SINK_RATIO) as usize).max(MIN_SINKS), kept)
            }
        }
    }
}

/// How one call changes the sinks and the window of a sequence.
#[derive(Debug, Clone, Copy)]
struct WindowUpdate {
    tokens: usize,
    /// The call's first tokens that become sinks.
    new_sinks: usize,
    /// Number of tokens that leave the window.
    evicted: usize,
    /// Tokens of the call, after the sinks, that never enter the window.
    skipped: usize,
}

impl<S: KvStore> StreamingLlm<S> {
    /// Creates a cache that keeps the first `sinks` tokens, and the newest `window` tokens in
    /// `store`.
    ///
    /// # Errors
    /// [`Error::Setting`] if `window` is 0, `store` is not empty, or the layer has no rotary
    /// embedding; [`Error::Unsupported`] if the layer has a sliding window.
    pub fn new(spec: LayerSpec, store: S, sinks: usize, window: usize) -> Result<Self> {
        if window == 0 {
            return Err(Error::setting("window", "at least 1 token", window));
        }
        Self::with_size(spec, store, Size::Tokens { sinks, window })
    }

    /// Creates a cache that keeps `ratio` of the prompt's tokens, at least 5: 2.1 % of them as
    /// sinks, but at least 4, the others as the window.
    ///
    /// [`expect_prompt`](Self::expect_prompt) sets a prompt's length in advance. Otherwise the
    /// window grows with the prompt, and the sinks are those of its first call.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Setting`] unless 0 < `ratio` < 1.
    pub fn with_ratio(spec: LayerSpec, store: S, ratio: f64) -> Result<Self> {
        check_ratio(ratio)?;
        Self::with_size(spec, store, Size::Ratio(ratio))
    }

    fn with_size(spec: LayerSpec, window: S, size: Size) -> Result<Self> {
        check_store(&spec, &window, "StreamingLLM")?;
        spec.require_rope("StreamingLLM")?;
        let sinks = DenseStore::new(spec.shape, DType::F32)?;
        Ok(Self { spec, size, step: 1, sinks, window, sequences: Sequences::default() })
    }

    /// Drops `step` tokens at a time, so that the window holds between `window - step + 1` and
    /// `window` tokens. With a step of a whole group, a packed store does not repack all groups.
    ///
    /// # Errors
    /// [`Error::Setting`] if `step` is 0 or more than the window.
    pub fn with_step(mut self, step: usize) -> Result<Self> {
        let max = match self.size {
            Size::Tokens { window, .. } => window,
            Size::Ratio(_) => usize::MAX,
        };
        if step == 0 || step > max {
            return Err(Error::setting("step", "from 1 to the window", step));
        }
        self.step = step;
        Ok(self)
    }

    /// Declares that the first `tokens` tokens of a sequence are its prompt, for a ratio.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the sequence has that many tokens already.
    pub fn expect_prompt(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        self.sequences.expect_prompt(seq, tokens)
    }

    /// Returns the store of sinks.
    pub fn sinks(&self) -> &DenseStore {
        &self.sinks
    }

    /// Returns the store of the newest tokens.
    pub fn window(&self) -> &S {
        &self.window
    }

    /// Returns how a call of `tokens` tokens changes a sequence.
    fn window_update(&self, seq: SeqId, tokens: usize) -> WindowUpdate {
        let (sinks, all) = self.size.of(self.sequences.prompt_with(seq, tokens));
        let (held, window) = (self.sinks.len(seq), self.window.len(seq));
        // Tokens can become sinks only if all tokens before them are sinks.
        let first = match held == self.sequences.seen(seq) {
            true => sinks.saturating_sub(held).min(tokens),
            false => 0,
        };
        let room = all.saturating_sub(held + first).max(1);
        let over = window.saturating_add(tokens - first).saturating_sub(room);
        // A ratio of a short prompt may give a window smaller than the step.
        let surplus = over.next_multiple_of(self.step.min(room));
        let leave = surplus.min(window);
        WindowUpdate { tokens, new_sinks: first, evicted: leave, skipped: surplus - leave }
    }

    /// A decoded token that enters the window is appended before it attends, so that it is read
    /// once.
    fn attend_and_append(
        &mut self,
        step: &Step<'_>,
        updates: &BTreeMap<SeqId, WindowUpdate>,
    ) -> Result<AttentionState> {
        let (q, k) = step.rotate(&self.spec, |seq| self.sequences.seen(seq))?;
        let within_cache = step.batch.positions(|seq| self.held(seq));
        let decoded = |seq| updates[&seq].tokens == 1 && updates[&seq].new_sinks == 0;
        let prompts = SubBatch::of_sequences(step.batch, |seq, _| !decoded(seq))?;
        let ones = SubBatch::of_sequences(step.batch, |seq, _| decoded(seq))?;
        let mut of_window = Vec::new();
        if let Some(part) = &prompts {
            let (q, k, v) = (part.rows(&q)?, part.rows(&k)?, part.rows(step.v)?);
            let mut parts = vec![attention::attend(&part.batch, &q, &k, &v, &self.spec.shape)?];
            if part.batch.seqs().iter().any(|&seq| self.window.len(seq) > 0) {
                parts.push(self.window.attend(&part.batch, &q, Mask::Full)?);
            }
            of_window.push((part, AttentionState::merge(&parts)?));
        }
        let mut parts = Vec::new();
        if step.batch.seqs().iter().any(|&seq| self.sinks.len(seq) > 0) {
            let q = self.spec.rotate(step.q, &within_cache)?;
            parts.push(self.sinks.attend(step.batch, &q, Mask::Full)?);
        }
        // One append for all sequences, so that a full pool is an error before anything has
        // changed.
        self.append(step, &k, updates)?;
        if let Some(part) = &ones {
            of_window.push((part, self.window.attend(&part.batch, &part.rows(&q)?, Mask::Causal)?));
        }
        parts.push(assemble(&of_window, step.batch.tokens())?);
        AttentionState::merge(&parts)
    }

    /// Appends the kept tokens of a call.
    fn append(
        &mut self,
        step: &Step<'_>,
        k: &Tensor,
        updates: &BTreeMap<SeqId, WindowUpdate>,
    ) -> Result<()> {
        let first = |seq, _| 0..updates[&seq].new_sinks;
        if let Some(part) = SubBatch::new(step.batch, first)? {
            if self.sinks.seqs().is_empty() && self.sinks.dtype() != k.dtype() {
                self.sinks = DenseStore::new(self.spec.shape, k.dtype())?;
            }
            self.sinks.append(&part.batch, &part.rows(k)?, &part.rows(step.v)?)?;
        }
        let newest = |seq, tokens| {
            let WindowUpdate { new_sinks, skipped, .. } = updates[&seq];
            new_sinks + skipped..tokens
        };
        if let Some(part) = SubBatch::new(step.batch, newest)? {
            self.window.append(&part.batch, &part.rows(k)?, &part.rows(step.v)?)?;
        }
        Ok(())
    }

    /// Drops tokens from the window, and counts those of the call.
    fn finish(&mut self, batch: &Batch, updates: &BTreeMap<SeqId, WindowUpdate>) -> Result<()> {
        for &seq in batch.seqs() {
            self.sequences.begin(seq, SeqState::default);
        }
        let keep = |&seq: &SeqId| {
            let evicted = updates[&seq].evicted;
            let newest = (evicted as u32..self.window.len(seq) as u32).collect();
            (evicted > 0).then(|| (seq, Selection::uniform(self.spec.shape.kv_heads, newest)))
        };
        let keep: Vec<_> = batch.seqs().iter().filter_map(keep).collect();
        if let Err(error) = self.window.retain_each(&keep) {
            return Err(self.sequences.poison(batch.seqs(), error));
        }
        for (seq, tokens) in batch.iter() {
            let WindowUpdate { evicted, skipped, .. } = updates[&seq];
            self.sequences.advance(seq, tokens.len());
            if let Some(sequence) = self.sequences.get_mut(seq).filter(|_| evicted + skipped > 0) {
                sequence.state.seen_at_drop = sequence.seen;
            }
        }
        Ok(())
    }

    fn window_updates(&self, batch: &Batch) -> BTreeMap<SeqId, WindowUpdate> {
        batch.iter().map(|(seq, own)| (seq, self.window_update(seq, own.len()))).collect()
    }

    /// Returns marks of a batch's sequences in the sinks and in the window.
    fn marks(&self, batch: &Batch) -> [Vec<Mark>; 2] {
        [marks(&self.sinks, batch), marks(&self.window, batch)]
    }

    /// Restores the stores to their contents before a failed call. Sequences that cannot be
    /// restored are poisoned.
    fn roll_back(
        &mut self,
        batch: &Batch,
        [sinks, window]: &[Vec<Mark>; 2],
        error: Error,
    ) -> Error {
        let mut lost = restore(&mut self.sinks, batch, sinks);
        lost.extend(restore(&mut self.window, batch, window));
        self.sequences.poison(&lost, error)
    }
}

impl<S: KvStore> KvCache for StreamingLlm<S> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        self.sequences.check(step.batch)?;
        let (updates, marks) = (self.window_updates(step.batch), self.marks(step.batch));
        let attended = self.attend_and_append(step, &updates);
        let out = attended.and_then(|state| self.spec.output(state, step.q.dtype()));
        let out = out.map_err(|error| self.roll_back(step.batch, &marks, error))?;
        self.finish(step.batch, &updates)?;
        Ok(out)
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        self.sequences.check(step.batch)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        let (updates, marks) = (self.window_updates(step.batch), self.marks(step.batch));
        let appended = self.append(step, &k, &updates);
        appended.map_err(|error| self.roll_back(step.batch, &marks, error))?;
        self.finish(step.batch, &updates)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.sequences.check_fork(from, to)?;
        fork(&mut self.window, from, to)?;
        fork(&mut self.sinks, from, to).inspect_err(|_| {
            self.window.remove(to);
        })?;
        self.sequences.fork(from, to);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let sequence = self.sequences.check_truncate(seq, len)?;
        let dropped = sequence.state.seen_at_drop;
        if len > 0 && len < dropped {
            let what = format!(
                "truncating to {len} tokens a sequence that had tokens dropped after {dropped}"
            );
            return Err(Error::Unsupported(what));
        }
        let window = self.window.len(seq);
        match window > 0 {
            true => self.window.check_truncate(seq, window.saturating_sub(sequence.seen - len)),
            false => Ok(()),
        }
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let dropped = self.sequences.seen(seq) - len;
        let (sinks, window) = (self.sinks.len(seq), self.window.len(seq));
        let left = if len == 0 { 0 } else { window.saturating_sub(dropped) };
        truncate(&mut self.window, seq, left)?;
        truncate(&mut self.sinks, seq, sinks.min(len))?;
        if let Some(sequence) = self.sequences.get_mut(seq) {
            sequence.state.seen_at_drop = sequence.state.seen_at_drop.min(len);
            sequence.truncate(len);
        }
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.sinks.remove(seq);
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
        self.sinks.len(seq) + self.window.len(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        let appended = batch.iter().filter_map(|(seq, own)| {
            let WindowUpdate { tokens, new_sinks, skipped, .. } =
                self.window_update(seq, own.len());
            Some((seq, tokens - new_sinks - skipped)).filter(|(_, tokens)| *tokens > 0)
        });
        let appended: Vec<_> = appended.collect();
        appended.is_empty()
            || Batch::new(&appended).is_ok_and(|batch| self.window.can_append(&batch))
    }

    fn footprint(&self) -> Footprint {
        self.sinks.footprint() + self.window.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.sinks.seq_footprint(seq) + self.window.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.sinks.clear();
        self.window.clear();
        self.sequences.clear();
    }
}

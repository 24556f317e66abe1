//! The cache that applies an eviction policy: one layer, any store, many sequences.

mod append;
mod decoded;
mod evict_one;
mod plan;
mod score;
mod step;

use std::collections::BTreeMap;

use crate::{
    Budget, EvictionPolicy, Granularity, HeadBudgets, LayerBudgets, Needs, Prefill, Protected,
    Settings,
    metadata::EntryMetadata,
    sequences::{Sequence, Sequences},
    storage::{check_store, marks},
};
use candle_core::Tensor;
use longctx_core::{
    Batch, Error, EvictOne, Footprint, KeptEntries, KvCache, KvStore, LayerSpec, PreparedDecode,
    Result, SeqId, Step, check_unseen,
};

/// A cache that keeps, in any store, the entries that a policy selects within a budget, separately
/// for each sequence.
///
/// Attention among the tokens of one call is exact: eviction follows it and frees the evicted
/// entries. A decoded token is appended to the store before it attends. Keys keep the rotation of
/// their original positions unless the cache [re-rotates](Settings::rerotate) them.
///
/// [`new`](Self::new) applies any policy with [default settings](Settings::new). Each published
/// method has its own constructor, with the settings of its published code:
/// [`snap_kv`](Self::snap_kv), [`h2o`](Self::h2o), [`tova`](Self::tova), [`finch`](Self::finch),
/// [`expected_attention`](Self::expected_attention), [`lag_kv`](Self::lag_kv),
/// [`recent`](Self::recent), [`duo_attention`](Self::duo_attention). Each `with_` method changes
/// one setting.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{
///     AttentionShape, Batch, DenseStore, KvCache, LayerSpec, Rope, RopeScaling, Step,
/// };
/// use token_drop::{Budget, HeadBudgets, PolicyCache, SnapKv};
///
/// let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None)?);
/// let spec = LayerSpec::new(AttentionShape::new(8, 2, 64)?).with_rope(rope);
/// let store = DenseStore::new(spec.shape, DType::F16)?;
/// let mut cache = PolicyCache::snap_kv(spec, store, SnapKv::new(32)?, Budget::Ratio(0.25))?;
/// let batch = Batch::new(&[(0, 400), (1, 200)])?;
/// let q = Tensor::randn(0f32, 1., (600, 8, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1., (600, 2, 64), &Device::Cpu)?;
/// cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &k })?;
/// assert_eq!((cache.seen(0), cache.held(0)), (400, 100));
/// assert_eq!((cache.seen(1), cache.held(1)), (200, 50));
/// assert!(cache.positions(1)?[0].ends_with(&[197, 198, 199]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// After an error of a call, its sequences are as before. A full pool, or a number that cannot be
/// packed, is noticed before anything has changed, but after the attention of the call's prompts:
/// ask [`can_append`](KvCache::can_append) first. After a later error, such as a policy's, a
/// sequence is poisoned if a packed store has packed older entries for the call.
///
/// In a pool of fixed capacity, eviction from blocks that forks share needs room for copies.
/// Without that room, eviction is postponed: the sequence exceeds its budget until a later call
/// evicts. Re-rotation cannot be postponed: without room, or with a number that the store's format
/// cannot represent, the sequences of the call are poisoned.
#[derive(Debug)]
pub struct PolicyCache<S, P> {
    spec: LayerSpec,
    store: S,
    policy: P,
    /// The inputs of the policy.
    needs: Needs,
    settings: Settings,
    sequences: Sequences<SeqState>,
    prepared: Prepared,
}

/// The last prepared step.
#[derive(Debug, Default)]
struct Prepared {
    /// Offset of the positions in its lists.
    positions: u64,
    /// Whether each sequence evicts an entry.
    evicts: bool,
    /// The evictions. Its kernels read their tensors, so these must live until the next step.
    evictions: Vec<EvictOne>,
    /// The entries that it replaced, whose memory the next step reuses.
    replaced: BTreeMap<SeqId, KeptEntries>,
}

/// The state of a sequence outside the store.
#[derive(Debug, Clone)]
struct SeqState {
    metadata: EntryMetadata,
    /// The newest queries before the rotary embedding, if the policy observes several of them
    /// during decoding.
    queries: Option<Tensor>,
    /// Number of tokens seen when entries were last evicted.
    seen_at_eviction: usize,
}

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Creates an empty cache over `store`, with [default settings](Settings::new).
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn new(spec: LayerSpec, store: S, policy: P, budget: Budget) -> Result<Self> {
        Self::with_settings(spec, store, policy, Settings::new(budget))
    }

    /// Creates an empty cache over `store`.
    ///
    /// # Errors
    /// [`Error::Setting`] naming a setting that cannot be met, conflicts with another one, or needs
    /// a rotary embedding that the layer lacks, and if the store is not empty; [`Error::Mismatch`]
    /// if the store was made for another shape; [`Error::Unsupported`] if the layer has a sliding
    /// window.
    pub fn with_settings(spec: LayerSpec, store: S, policy: P, settings: Settings) -> Result<Self> {
        check_store(&spec, &store, "an eviction policy")?;
        let needs = policy.needs();
        settings.check(&spec, &needs)?;
        let sequences = Sequences::default();
        let prepared = Prepared::default();
        Ok(Self { spec, store, policy, needs, settings, sequences, prepared })
    }

    /// Sets how the model's layers share the budget.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn with_layer_budgets(mut self, layer_budgets: LayerBudgets) -> Result<Self> {
        self.settings.layer_budgets = layer_budgets;
        self.checked()
    }

    /// Sets how the layer's kv heads share the budget.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn with_head_budgets(mut self, head_budgets: HeadBudgets) -> Result<Self> {
        self.settings.head_budgets = head_budgets;
        self.checked()
    }

    /// Sets the unit of selection: tokens or chunks.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn with_granularity(mut self, granularity: Granularity) -> Result<Self> {
        self.settings.granularity = granularity;
        self.checked()
    }

    /// Sets the entries that are kept regardless of their scores.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn with_protected(mut self, protected: Protected) -> Result<Self> {
        self.settings.protected = protected;
        self.checked()
    }

    /// Sets which calls of a prompt are followed by eviction.
    #[must_use]
    pub fn with_prefill(mut self, prefill: Prefill) -> Self {
        self.settings.prefill = prefill;
        self
    }

    /// Sets how many entries a head evicts at a time during decoding. A head then holds between
    /// `budget - step + 1` and `budget` entries. `None` keeps all decoded tokens.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn with_decode_step(mut self, step: Option<usize>) -> Result<Self> {
        self.settings.decode_step = step;
        self.checked()
    }

    /// Keeps all entries of the prompt, and applies the budget to the tokens after it.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn with_kept_prompt(mut self) -> Result<Self> {
        self.settings.keep_prompt = true;
        self.checked()
    }

    /// Rotates kept keys to contiguous positions after each eviction.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn with_rerotation(mut self) -> Result<Self> {
        self.settings.rerotate = true;
        self.checked()
    }

    fn checked(self) -> Result<Self> {
        self.settings.check(&self.spec, &self.needs)?;
        Ok(self)
    }

    /// Boxes the policy, for policies that are chosen at run time.
    pub fn boxed(self) -> PolicyCache<S, Box<dyn EvictionPolicy>>
    where
        P: 'static,
    {
        let Self { spec, store, policy, needs, settings, sequences, prepared } = self;
        PolicyCache { spec, store, policy: Box::new(policy), needs, settings, sequences, prepared }
    }

    /// Declares that the first `tokens` tokens of a sequence are its prompt, so that a budget that
    /// is a ratio is the same from the first chunk on. Single-token calls within that length then
    /// belong to the prompt. Calls of several tokens after it, such as speculative drafts, are
    /// decoding.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the sequence has that many tokens already.
    pub fn expect_prompt(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        self.sequences.expect_prompt(seq, tokens)
    }

    /// Returns the store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Returns the policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// Returns the settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the original positions of each kv head's entries, `[kv_heads]` lists; empty for an
    /// unknown sequence. They increase, except after decoded tokens of H2O or TOVA on a CUDA device:
    /// there a token takes the place of the entry that it evicts.
    ///
    /// # Errors
    /// If the positions are on a device and the copy fails.
    pub fn positions(&self, seq: SeqId) -> Result<Vec<Vec<u32>>> {
        let of = |sequence: &Sequence<SeqState>| sequence.state.metadata.positions();
        self.sequences.get(seq).map_or(Ok(Vec::new()), of)
    }

    /// Returns the position of a sequence's next token: a cache that re-rotates leaves no gaps.
    fn next_position(&self, seq: SeqId) -> usize {
        if self.settings.rerotate { self.held(seq) } else { self.seen(seq) }
    }

    /// Returns the number of newest queries to keep: those that the policy observes during
    /// decoding.
    fn num_kept_queries(&self) -> usize {
        if self.settings.decode_step.is_none() {
            return 0;
        }
        let observed = match self.needs.attention {
            Some(crate::ObservedQueries::Newest { queries, .. }) if queries > 1 => queries,
            _ => 0,
        };
        self.needs.queries.unwrap_or(0).max(observed)
    }
}

impl<S: KvStore, P: EvictionPolicy> KvCache for PolicyCache<S, P> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        self.check(step)?;
        #[cfg(feature = "cuda")]
        if let Some(prepared) = step.batch.prepared() {
            return self.attend_prepared(step, prepared.lists);
        }
        let only_appends = self.only_appends(step.batch);
        let evicts_one = !only_appends && self.evicts_one(step.batch);
        let marks = marks(&self.store, step.batch);
        self.add_tokens(step.batch);
        let out = match (only_appends, evicts_one) {
            (true, _) => self.append_and_attend(step),
            (_, true) => self.attend_and_evict_one(step),
            _ => self.attend_and_evict(step),
        };
        out.map_err(|error| self.roll_back(step.batch, &marks, error))
    }

    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        self.check(step)?;
        check_unseen(self, step.batch)?;
        if self.needs_lse() {
            crate::storage::check_lse(step, lse, &self.spec)?;
        }
        let marks = marks(&self.store, step.batch);
        self.add_tokens(step.batch);
        self.append_attended(step, lse).map_err(|error| self.roll_back(step.batch, &marks, error))
    }

    fn prepared_decode(&mut self, batch: &Batch) -> Option<&mut dyn PreparedDecode> {
        self.prepares_decode(batch).then_some(self)
    }

    fn needs_lse(&self) -> bool {
        self.needs.attention.is_some()
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.sequences.check_fork(from, to)?;
        self.store.fork(from, to)?;
        self.sequences.fork(from, to);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let sequence = self.sequences.check_truncate(seq, len)?;
        if len == sequence.seen || len == 0 {
            return Ok(());
        }
        self.check_restorable(sequence, len)?;
        let lens = lens_without(&sequence.state.metadata, sequence.seen - len);
        self.store.check_truncate_heads(seq, &lens)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let kv_heads = self.spec.shape.kv_heads;
        let Some(sequence) = self.sequences.get_mut(seq) else {
            return Err(Error::UnknownSequence(seq));
        };
        let dropped = sequence.seen - len;
        if len == 0 {
            self.store.truncate(seq, 0)?;
            sequence.state = SeqState::new(kv_heads);
        } else if dropped > 0 {
            self.store.truncate_heads(seq, &lens_without(&sequence.state.metadata, dropped))?;
            sequence.state.metadata.drop_newest(dropped);
            sequence.state.drop_newest_queries(dropped)?;
        }
        sequence.truncate(len);
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.prepared.replaced.remove(&seq);
        self.store.remove(seq);
        self.sequences.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.sequences.ids()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.sequences.seen(seq)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.store.len(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        // All tokens of a sequence that holds entries are appended before some are evicted.
        if batch.seqs().iter().all(|&seq| self.store.len(seq) > 0) {
            return self.store.can_append(batch);
        }
        let appended: Vec<_> =
            batch.iter().map(|(seq, own)| (seq, self.max_appended(seq, own.len()))).collect();
        Batch::new(&appended).is_ok_and(|batch| self.store.can_append(&batch))
    }

    fn footprint(&self) -> Footprint {
        let states = self.sequences.iter().map(|(_, sequence)| sequence.state.footprint());
        self.store.footprint() + states.sum() + self.prepared.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        let state = self.sequences.get(seq).map(|sequence| sequence.state.footprint());
        self.store.seq_footprint(seq) + state.unwrap_or_default()
    }

    fn clear(&mut self) {
        self.store.clear();
        self.sequences.clear();
        self.prepared.replaced.clear();
    }
}

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Checks a call before anything changes.
    fn check(&self, step: &Step<'_>) -> Result<()> {
        step.check(&self.spec)?;
        self.sequences.check(step.batch)
    }

    /// Checks that the entries of a sequence's first `len` tokens can be restored.
    fn check_restorable(&self, sequence: &Sequence<SeqState>, len: usize) -> Result<()> {
        let state = &sequence.state;
        let unsupported = |why: String| Err(Error::Unsupported(format!("truncating {why}")));
        if len < state.seen_at_eviction {
            let last = state.seen_at_eviction;
            return unsupported(format!(
                "to {len} tokens a sequence that had entries evicted after {last}"
            ));
        }
        if self.needs.previous_scores {
            return unsupported("a sequence whose scores are sums over all its tokens".into());
        }
        let wanted = self.num_kept_queries();
        let kept = state.queries.as_ref().map_or(Ok(0), |q| q.dim(0))?;
        if kept.saturating_sub(sequence.seen - len) < wanted.min(len) {
            return unsupported(format!(
                "a sequence of which the newest {wanted} queries are kept"
            ));
        }
        Ok(())
    }

    /// Returns the largest number of entries that a call of `tokens` tokens appends to a head.
    fn max_appended(&self, seq: SeqId, tokens: usize) -> usize {
        let prompt = self.sequences.prompt_with(seq, tokens).len();
        let seen = self.seen(seq).saturating_add(tokens);
        let (budgets, _) = self.settings.limits(&self.spec, prompt, seen);
        let budget = budgets.into_iter().max().unwrap_or(usize::MAX);
        let even = self.settings.head_budgets == HeadBudgets::Uniform;
        // The host does not know how many of the call's own tokens a selection on a device keeps.
        match self.evicts_after_prefill(seq, tokens) && even && self.store.len(seq) == 0 {
            true => tokens.min(budget),
            false => tokens,
        }
    }
}

/// Returns each head's number of entries without the newest `count` tokens.
fn lens_without(entries: &EntryMetadata, count: usize) -> Vec<usize> {
    entries.lens().into_iter().map(|len| len.saturating_sub(count)).collect()
}

impl Prepared {
    fn footprint(&self) -> Footprint {
        let bytes = |kept: &KeptEntries| {
            4 * kept.positions.elem_count()
                + kept.scores.as_ref().map_or(0, |of| 4 * of.elem_count())
        };
        Footprint { bookkeeping: self.replaced.values().map(bytes).sum(), ..Default::default() }
    }
}

impl SeqState {
    fn new(kv_heads: usize) -> Self {
        Self { metadata: EntryMetadata::new(kv_heads), queries: None, seen_at_eviction: 0 }
    }

    /// Drops the newest `count` queries.
    fn drop_newest_queries(&mut self, count: usize) -> Result<()> {
        self.queries = match self.queries.take() {
            Some(q) if q.dim(0)? > count => Some(q.narrow(0, 0, q.dim(0)? - count)?),
            _ => None,
        };
        Ok(())
    }

    fn footprint(&self) -> Footprint {
        let bytes = |q: &Tensor| q.elem_count() * q.dtype().size_in_bytes();
        let queries = self.queries.as_ref().map_or(0, bytes);
        Footprint { bookkeeping: self.metadata.bytes() + queries, ..Default::default() }
    }
}

use std::collections::BTreeMap;
use std::sync::Arc;

use super::QuantStore;
use super::sub_batch::SubBatch;
use crate::{Format, KeyBasis, Rotary};
use candle_core::{DType, Tensor};
use longctx_core::{
    AttentionState, Batch, Error, Footprint, KvCache, KvStore, LayerSpec, Mark, Mask,
    PreparedDecode, Result, SeenTokens, SeqId, Step, StepLists, attention, check_unseen,
};

/// When a call's tokens are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Order {
    /// After their attention in full precision: a whole prompt has exact attention. As in KIVI.
    #[default]
    AttendFirst,
    /// Before their attention: they see each other quantized, as later tokens will. As in FlexGen
    /// in the benchmark of arXiv 2407.01527.
    QuantizeFirst,
}

/// A cache of packed keys and values: KIVI with [`Format::kivi`], FlexGen with [`Format::flexgen`]
/// and [`Order::QuantizeFirst`].
///
/// Keys are packed after the rotary embedding, unless the format has [`KeyBasis::BeforeRope`].
/// Layers may have different bits: each has its own cache.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{Device, Tensor};
/// use kv_quant::{Bits, Format, Order, QuantCache};
/// use longctx_core::{AttentionShape, Batch, KvCache, LayerSpec, Rope, RopeScaling, Step};
///
/// let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None)?);
/// let spec = LayerSpec::new(AttentionShape::new(8, 2, 64)?).with_rope(rope);
/// let kivi = QuantCache::new(spec.clone(), Format::kivi(Bits::Four, Bits::Two, 32, 128)?)?;
/// let flexgen = QuantCache::new(spec, Format::flexgen(Bits::Four, Bits::Four, 64)?)?
///     .with_order(Order::QuantizeFirst)
///     .with_sinks(4)?;
/// for mut cache in [kivi, flexgen] {
///     for batch in [Batch::new(&[(0, 1000), (1, 50)])?, Batch::decode(&[0, 1])?] {
///         let q = Tensor::randn(0f32, 1., (batch.tokens(), 8, 64), &Device::Cpu)?;
///         let k = Tensor::randn(0f32, 1., (batch.tokens(), 2, 64), &Device::Cpu)?;
///         cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &k })?;
///     }
///     assert_eq!((cache.held(0), cache.held(1)), (1001, 51));
///     assert!(cache.seq_footprint(0).payload < 1001 * 2 * 64);
/// }
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QuantCache {
    spec: LayerSpec,
    format: Format,
    order: Order,
    /// The first tokens (attention sinks) of each sequence, in f16.
    sinks: QuantStore,
    sink_tokens: usize,
    store: QuantStore,
    seen: SeenTokens,
    /// The errors of failed calls whose tokens could not be taken back.
    poisoned: BTreeMap<SeqId, String>,
    /// Offset of the positions in the lists of the last prepared step.
    positions: u64,
}

impl QuantCache {
    /// Creates an empty cache.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a layer with a sliding window; [`Error::Setting`] for keys
    /// [before RoPE](KeyBasis::BeforeRope) in a layer without a rotary embedding; the errors of
    /// [`QuantStore::new`].
    pub fn new(spec: LayerSpec, format: Format) -> Result<Self> {
        if spec.shape.window.is_some() {
            let what = "a packed cache in a layer with a sliding window";
            return Err(Error::Unsupported(what.into()));
        }
        let store = Self::make_store(&spec, format, 0)?;
        let sinks = QuantStore::new(spec.shape, Format::f16())?;
        Ok(Self {
            spec,
            format,
            order: Order::default(),
            sinks,
            sink_tokens: 0,
            store,
            seen: SeenTokens::default(),
            poisoned: BTreeMap::new(),
            positions: 0,
        })
    }

    /// Creates the store of the tokens after the first `sinks`.
    fn make_store(spec: &LayerSpec, format: Format, sinks: usize) -> Result<QuantStore> {
        if format.key_basis() != KeyBasis::BeforeRope {
            return QuantStore::new(spec.shape, format);
        }
        let rope = spec.require_rope("a cache of keys before RoPE")?;
        let rotary = Arc::new(Rotary::new(rope.frequencies(), sinks)?);
        QuantStore::before_rope(spec.shape, format, rotary)
    }

    /// Sets when a call's tokens are quantized.
    #[must_use]
    pub fn with_order(self, order: Order) -> Self {
        Self { order, ..self }
    }

    /// Keeps the first `tokens` tokens of each sequence (attention sinks) in f16: they receive a
    /// large share of the attention (arXiv 2309.17453), and their keys are outliers.
    ///
    /// # Errors
    /// [`Error::Setting`] if the cache is not empty.
    pub fn with_sinks(self, tokens: usize) -> Result<Self> {
        let held = self.seen.seqs().len();
        if held > 0 {
            return Err(Error::setting("sinks", "an empty cache", format!("{held} sequences")));
        }
        let mut store = Self::make_store(&self.spec, self.format, tokens)?;
        if let Some(bytes) = self.store.capacity() {
            store = store.with_capacity(bytes);
        }
        Ok(Self { sink_tokens: tokens, store, ..self })
    }

    /// Limits the packed blocks and residuals in use to `bytes` bytes. Sinks are not included.
    #[must_use]
    pub fn with_capacity(self, bytes: usize) -> Self {
        Self { store: self.store.with_capacity(bytes), ..self }
    }

    /// Returns the store of packed keys and values.
    pub fn store(&self) -> &QuantStore {
        &self.store
    }

    /// Returns the store of the first tokens of each sequence, in f16.
    pub fn sinks(&self) -> &QuantStore {
        &self.sinks
    }

    /// Returns when tokens are quantized.
    pub fn order(&self) -> Order {
        self.order
    }

    /// Returns the format of keys and values.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns both stores, to load a sequence into them.
    #[cfg(feature = "save")]
    pub(super) fn stores_mut(&mut self) -> (&mut QuantStore, &mut QuantStore) {
        (&mut self.sinks, &mut self.store)
    }

    /// Registers a sequence that both stores hold.
    #[cfg(feature = "save")]
    pub(super) fn register(&mut self, seq: SeqId) {
        self.seen.set(seq, self.held(seq));
    }

    /// Returns how many of the next `coming` tokens of a sequence are sinks.
    fn count_sinks(&self, seq: SeqId, coming: usize) -> usize {
        self.sink_tokens.saturating_sub(self.seen(seq)).min(coming)
    }

    /// Splits the batch's tokens into sinks and others.
    fn split_sinks(&self, batch: &Batch) -> Result<(Option<SubBatch>, Option<SubBatch>)> {
        let first = |seq, tokens: &std::ops::Range<usize>| {
            tokens.start + self.count_sinks(seq, tokens.len())
        };
        let sinks = SubBatch::of(batch, |seq, tokens| tokens.start..first(seq, &tokens))?;
        let rest = SubBatch::of(batch, |seq, tokens| first(seq, &tokens)..tokens.end)?;
        Ok((sinks, rest))
    }

    /// Checks that there is room for a call's tokens, before their attention is computed.
    fn check_room(&mut self, step: &Step<'_>) -> Result<()> {
        match self.split_sinks(step.batch)? {
            (_, Some(rest)) => self.store.check_append(&rest.batch, step.k.device()),
            (_, None) => Ok(()),
        }
    }

    /// Appends a call's tokens to the two stores. On an error neither has changed.
    fn append(&mut self, step: &Step<'_>, rotated: &Tensor) -> Result<()> {
        let keys = if self.format.key_basis() == KeyBasis::BeforeRope { step.k } else { rotated };
        let (Some(sinks), rest) = self.split_sinks(step.batch)? else {
            return self.store.append(step.batch, keys, step.v);
        };
        self.sinks.append(&sinks.batch, &sinks.rows(rotated)?, &sinks.rows(step.v)?)?;
        let Some(rest) = rest else { return Ok(()) };
        let done = self.store.append(&rest.batch, &rest.rows(keys)?, &rest.rows(step.v)?);
        if done.is_err() {
            for &seq in sinks.batch.seqs() {
                match self.seen.get(seq) {
                    // The f16 store does not pack, so its truncation restores the previous contents
                    // exactly.
                    Some(seen) => self.sinks.truncate(seq, seen)?,
                    None => {
                        self.sinks.remove(seq);
                    }
                }
            }
        }
        done
    }

    /// Exact attention among a call's tokens, merged with attention over earlier ones.
    fn attend_exactly(&self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<AttentionState> {
        let mut parts = vec![attention::attend(step.batch, q, k, step.v, &self.spec.shape)?];
        for store in [&self.sinks, &self.store] {
            if step.batch.seqs().iter().any(|&seq| store.len(seq) > 0) {
                parts.push(store.attend(step.batch, q, Mask::Full)?);
            }
        }
        AttentionState::merge(&parts)
    }

    /// Checks that a sequence is not poisoned.
    pub(super) fn check(&self, seq: SeqId) -> Result<()> {
        match self.poisoned.get(&seq) {
            Some(reason) => Err(Error::Poisoned { seq, reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Checks that no sequence of a batch is poisoned.
    fn check_all(&self, batch: &Batch) -> Result<()> {
        batch.seqs().iter().try_for_each(|&seq| self.check(seq))
    }

    /// Poisons sequences after a call that failed and whose tokens cannot be taken back. New
    /// sequences are removed. Returns the error of the call.
    fn poison(&mut self, seqs: &[SeqId], error: Error) -> Error {
        for &seq in seqs {
            match self.seen.get(seq) {
                Some(_) => drop(self.poisoned.insert(seq, error.to_string())),
                None => drop(self.remove(seq)),
            }
        }
        error
    }

    /// Attends, and then appends the call's tokens.
    fn attend_first(&mut self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        if let Some(parts) = self.attend_in_store(step, q, k)? {
            let out = self.output(step, &parts);
            return out.map_err(|error| self.poison(step.batch.seqs(), error));
        }
        self.check_room(step)?;
        let out = self.output(step, &[self.attend_exactly(step, q, k)?])?;
        self.append(step, k)?;
        Ok(out)
    }

    /// Appends the call's tokens, and then attends. After an error the stores are restored, or the
    /// sequences are poisoned.
    fn quantize_first(&mut self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        let seqs = step.batch.seqs();
        let marks: Vec<_> =
            seqs.iter().map(|&seq| [&self.sinks, &self.store].map(|of| of.mark(seq))).collect();
        let split = self.split_sinks(step.batch)?;
        self.append(step, k)?;
        let state = self.attend_packed(step.batch, q, split);
        let out = state.and_then(|state| self.output(step, &[state]));
        out.map_err(|error| {
            let lost = seqs.iter().zip(&marks).filter(|(seq, marks)| !self.restore(**seq, marks));
            let lost: Vec<_> = lost.map(|(&seq, _)| seq).collect();
            self.poison(&lost, error)
        })
    }

    /// Restores a sequence in both stores. Returns whether it was possible.
    fn restore(&mut self, seq: SeqId, [sinks, store]: &[Mark; 2]) -> bool {
        self.sinks.restore(seq, sinks).and(self.store.restore(seq, store)).is_ok()
    }

    /// Returns the output of a call from parts of its attention.
    fn output(&self, step: &Step<'_>, parts: &[AttentionState]) -> Result<Tensor> {
        self.spec.output(AttentionState::merge(parts)?, step.q.dtype())
    }

    /// Attends and appends in the store, if it can attend to the call's tokens before it packs
    /// them. Returns the attention over the sinks, if there are any, and over the other entries.
    fn attend_in_store(
        &mut self,
        step: &Step<'_>,
        q: &Tensor,
        k: &Tensor,
    ) -> Result<Option<Vec<AttentionState>>> {
        // Attention over two stores is merged, and sink logits are added, in f32.
        let merges = self.sink_tokens > 0 || self.spec.sink_logits.is_some();
        let dtype = match step.q.dtype() {
            half @ (DType::F16 | DType::BF16) if !merges => half,
            _ => DType::F32,
        };
        if self.sink_tokens == 0 {
            let state = self.store.append_after_attention(step.batch, (q, k, step.v), dtype)?;
            return Ok(state.map(|state| vec![state]));
        }
        if k.device().is_cpu() || !self.holds_sinks(step.batch) {
            return Ok(None);
        }
        let sinks = self.sinks.attend(step.batch, q, Mask::Full)?;
        let rest = self.store.append_after_attention(step.batch, (q, k, step.v), dtype)?;
        Ok(rest.map(|rest| vec![sinks, rest]))
    }

    /// Returns whether each sequence of a batch has all its sinks.
    fn holds_sinks(&self, batch: &Batch) -> bool {
        batch.seqs().iter().all(|&seq| self.seen(seq) >= self.sink_tokens)
    }

    /// Launches the attention of a prepared step.
    #[cfg(feature = "cuda")]
    fn attend_prepared(&mut self, step: &Step<'_>, lists: u64) -> Result<Tensor> {
        // SAFETY: the lists are those that `prepare_decode` has made for this batch, as the caller of
        // `Batch::with_prepared` guarantees. They have a position for each token at this offset.
        let (q, k) = unsafe { step.rotate_at(&self.spec, lists + self.positions) }?;
        let unprepared = || Error::Unsupported("a prepared decode step of this cache".into());
        let parts = self.attend_in_store(step, &q, &k)?.ok_or_else(unprepared)?;
        self.output(step, &parts)
    }

    /// Attention of tokens that are already in the stores. `split` was made before they were
    /// appended.
    fn attend_packed(
        &self,
        batch: &Batch,
        q: &Tensor,
        split: (Option<SubBatch>, Option<SubBatch>),
    ) -> Result<AttentionState> {
        if self.sink_tokens == 0 {
            return self.store.attend(batch, q, Mask::Causal);
        }
        let mut parts = Vec::new();
        if let (Some(part), _) = split {
            let state = self.sinks.attend(&part.batch, &part.rows(q)?, Mask::Causal)?;
            parts.push((part, state));
        }
        if let (_, Some(part)) = split {
            let q = part.rows(q)?;
            let state = AttentionState::merge(&[
                self.sinks.attend(&part.batch, &q, Mask::Full)?,
                self.store.attend(&part.batch, &q, Mask::Causal)?,
            ])?;
            parts.push((part, state));
        }
        SubBatch::assemble(&parts)
    }
}

impl KvCache for QuantCache {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        #[cfg(feature = "cuda")]
        if let Some(prepared) = step.batch.prepared() {
            return self.attend_prepared(step, prepared.lists);
        }
        self.check_all(step.batch)?;
        let (q, k) = step.rotate(&self.spec, |seq| self.seen(seq))?;
        let out = match self.order {
            Order::AttendFirst => self.attend_first(step, &q, &k)?,
            Order::QuantizeFirst => self.quantize_first(step, &q, &k)?,
        };
        self.seen.advance(step.batch);
        Ok(out)
    }

    /// Both [`Order`]s pack the tokens in the same way.
    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        self.append(step, &k)?;
        self.seen.advance(step.batch);
        Ok(())
    }

    fn prepared_decode(&mut self, batch: &Batch) -> Option<&mut dyn PreparedDecode> {
        let sinks =
            self.sink_tokens == 0 || (self.sinks.prepares_attend() && self.holds_sinks(batch));
        let prepares = batch.check_decode().is_ok()
            && self.spec.rotates_on_cuda()
            && self.check_all(batch).is_ok()
            && self.order == Order::AttendFirst
            && sinks
            && self.store.prepares_append_after_attention(batch);
        prepares.then_some(self)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let seen = self.seen.check_fork(from, to)?;
        self.check(from)?;
        let fork = |store: &mut QuantStore| match store.lens(from).is_empty() {
            true => Ok(()),
            false => store.fork(from, to),
        };
        fork(&mut self.sinks)?;
        fork(&mut self.store).inspect_err(|_| {
            self.sinks.remove(to);
        })?;
        self.seen.set(to, seen);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.seen.check_truncate(seq, len)?;
        self.check(seq)?;
        let packed = len.saturating_sub(self.sink_tokens);
        match self.store.len(seq) > packed {
            true => self.store.check_truncate(seq, packed),
            false => Ok(()),
        }
    }

    /// Exact if the truncation stays within the full-precision residual.
    /// [`Pool::truncate`](crate::Pool::truncate) describes the effect of a deeper one.
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let packed = len.saturating_sub(self.sink_tokens);
        if self.store.len(seq) > packed {
            self.store.truncate(seq, packed)?;
        }
        if self.sinks.len(seq) > len {
            self.sinks.truncate(seq, len)?;
        }
        self.seen.set(seq, len);
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.sinks.remove(seq);
        self.store.remove(seq);
        self.poisoned.remove(&seq);
        self.seen.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.seen.seqs()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.seen.get(seq).unwrap_or(0)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.sinks.len(seq) + self.store.len(seq)
    }

    /// Counts sinks as packed tokens, which never underestimates the memory.
    fn can_append(&self, batch: &Batch) -> bool {
        self.store.can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        self.sinks.footprint() + self.store.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.sinks.seq_footprint(seq) + self.store.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.sinks.clear();
        self.store.clear();
        self.poisoned.clear();
        self.seen.clear();
    }
}

impl PreparedDecode for QuantCache {
    fn prepare_decode(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        if self.sink_tokens > 0 {
            self.sinks.prepare_attend(batch, lists)?;
        }
        self.store.prepare_append_after_attention(batch, lists)?;
        self.positions = lists.push_positions(batch, |seq| self.seen(seq));
        self.seen.advance(batch);
        Ok(())
    }
}

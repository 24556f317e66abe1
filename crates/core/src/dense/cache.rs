use std::collections::BTreeMap;

use super::DenseStore;
use crate::cache::check_window_truncate;
use crate::{
    Batch, Error, Footprint, KvCache, KvStore, LayerSpec, Mask, Result, Selection, SeqId, Step,
    check_unseen,
};
use candle_core::{DType, Tensor};

/// Entries beyond a sliding window that a sequence may hold before they are dropped.
const EVICTION_STEP: usize = 256;

/// The exact cache. It keeps every entry or, with a sliding window, every entry that a later token
/// can see.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{AttentionShape, Batch, DenseCache, KvCache, LayerSpec, Rope, RopeScaling, Step};
///
/// let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None)?);
/// let spec = LayerSpec::new(AttentionShape::new(8, 2, 64)?).with_rope(rope);
/// let mut cache = DenseCache::new(spec, DType::F16)?;
/// // Two prompts, then a token for each.
/// for batch in [Batch::new(&[(0, 100), (1, 30)])?, Batch::decode(&[0, 1])?] {
///     let q = Tensor::randn(0f32, 1., (batch.tokens(), 8, 64), &Device::Cpu)?;
///     let k = Tensor::randn(0f32, 1., (batch.tokens(), 2, 64), &Device::Cpu)?;
///     let out = cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &k })?;
///     assert_eq!(out.dims(), [batch.tokens(), 8, 64]);
/// }
/// assert_eq!((cache.seen(0), cache.seen(1)), (101, 31));
/// assert_eq!(cache.footprint().payload, 132 * 2 * 64 * 2 * 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DenseCache {
    spec: LayerSpec,
    store: DenseStore,
    seen: BTreeMap<SeqId, usize>,
}

impl DenseCache {
    /// Creates an empty cache of dtype f32, f16 or bf16.
    ///
    /// # Errors
    /// [`Error::Setting`] for another dtype.
    pub fn new(spec: LayerSpec, dtype: DType) -> Result<Self> {
        let store = DenseStore::new(spec.shape, dtype)?;
        Ok(Self { spec, store, seen: BTreeMap::new() })
    }

    /// Creates a cache that holds at most `bytes` bytes of keys and values.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_capacity(spec: LayerSpec, dtype: DType, bytes: usize) -> Result<Self> {
        let store = DenseStore::with_capacity(spec.shape, dtype, bytes)?;
        Ok(Self { spec, store, seen: BTreeMap::new() })
    }

    /// Returns the store of rotated keys and values.
    pub fn store(&self) -> &DenseStore {
        &self.store
    }

    /// Counts a batch's tokens as seen and drops entries that have left the sliding window.
    fn advance(&mut self, batch: &Batch) -> Result<()> {
        for (seq, tokens) in batch.iter() {
            *self.seen.entry(seq).or_default() += tokens.len();
        }
        let Some(window) = self.spec.shape.window else { return Ok(()) };
        for &seq in batch.seqs() {
            let len = self.store.len(seq);
            if len > window + EVICTION_STEP {
                let newest = (len - window) as u32..len as u32;
                let keep = Selection::uniform(self.spec.shape.kv_heads, newest.collect());
                // Dropping may need blocks for copies of shared ones. Without room for them the
                // entries stay until the next call.
                match self.store.retain(seq, &keep) {
                    Err(Error::PoolFull { .. }) => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }
}

impl KvCache for DenseCache {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        let (q, k) = step.rotate(&self.spec, |seq| self.seen(seq))?;
        self.store.append(step.batch, &k, step.v)?;
        let out = self.store.attend(step.batch, &q, Mask::Causal)?;
        self.advance(step.batch)?;
        self.spec.output(out, step.q.dtype())
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        self.store.append(step.batch, &k, step.v)?;
        self.advance(step.batch)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.store.fork(from, to)?;
        self.seen.insert(to, self.seen(from));
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let seen = *self.seen.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let held = self.store.len(seq);
        check_window_truncate(seq, seen, held, self.spec.shape.window, len)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let dropped = self.seen(seq) - self.store.len(seq);
        self.store.truncate(seq, len - dropped)?;
        self.seen.insert(seq, len);
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.store.remove(seq);
        self.seen.remove(&seq).is_some()
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.seen.keys().copied().collect()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.seen.get(&seq).copied().unwrap_or(0)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.store.len(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.store.can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        self.store.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.store.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.store.clear();
        self.seen.clear();
    }
}

use super::DenseStore;
use crate::store_cache::{append_and_attend, drop_oldest};
use crate::{Batch, CacheStrategy, KvStore, LayerSpec, Result, SeqId, Step, StepLists, StoreCache};
use candle_core::{DType, Tensor};

/// Entries beyond a sliding window that a sequence may hold before they are dropped.
const EVICTION_STEP: usize = 256;

/// The exact cache. It keeps every entry or, with a sliding window, every entry that a later token
/// can see.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{
///     AttentionShape, Batch, DenseCache, KvCache, LayerSpec, Rope, RopeScaling, Step,
/// };
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
pub type DenseCache = StoreCache<DenseStore, DenseStrategy>;

/// The strategy of a [`DenseCache`].
#[derive(Debug, Clone, Copy)]
pub struct DenseStrategy;

impl StoreCache<DenseStore, DenseStrategy> {
    /// Creates an empty cache of dtype f32, f16 or bf16.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for another dtype.
    pub fn new(spec: LayerSpec, dtype: DType) -> Result<Self> {
        let store = DenseStore::new(spec.shape, dtype)?;
        Self::with_strategy(spec, store, DenseStrategy)
    }

    /// Creates a cache that holds at most `bytes` bytes of keys and values.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_capacity(spec: LayerSpec, dtype: DType, bytes: usize) -> Result<Self> {
        let store = DenseStore::with_capacity(spec.shape, dtype, bytes)?;
        Self::with_strategy(spec, store, DenseStrategy)
    }
}

impl CacheStrategy<DenseStore> for DenseStrategy {
    fn attend(&self, spec: &LayerSpec, store: &mut DenseStore, step: &Step<'_>) -> Result<Tensor> {
        append_and_attend(spec, store, step)
    }

    fn prepares_decode(&self, _: &LayerSpec, store: &DenseStore) -> bool {
        store.prepares_decode()
    }

    /// Drops the entries beyond the sliding window that the previous step left, unless copies of
    /// shared blocks would take the room for the new tokens.
    fn prepare_decode(
        &self,
        spec: &LayerSpec,
        store: &mut DenseStore,
        batch: &Batch,
        lists: &mut StepLists,
    ) -> Result<()> {
        for &seq in batch.seqs() {
            if let Some(count) = beyond_window(spec, store, seq)
                && store.can_copy_and_append(seq, batch)
            {
                drop_oldest(store, seq, count)?;
            }
        }
        store.prepare_decode(batch, lists)
    }

    /// Drops entries that have left the sliding window.
    fn evict(&self, spec: &LayerSpec, store: &mut DenseStore, batch: &Batch) -> Result<()> {
        for &seq in batch.seqs() {
            if let Some(count) = beyond_window(spec, store, seq) {
                drop_oldest(store, seq, count)?;
            }
        }
        Ok(())
    }
}

/// Returns the number of a sequence's entries that have left the sliding window, if there are enough
/// to drop.
fn beyond_window(spec: &LayerSpec, store: &DenseStore, seq: SeqId) -> Option<usize> {
    let (window, len) = (spec.shape.window?, store.len(seq));
    (len > window + EVICTION_STEP).then(|| len - window)
}

//! A cache that keeps the half of each prompt whose values have the largest norm.

use candle_core::{D, DType, Tensor};
use longctx_core::{
    Batch, CacheStrategy, DenseStore, KvStore, LayerSpec, Mask, Result, Selection, SeqId, Step,
    StoreCache,
};

/// Attends to all entries, then drops half of each prompt.
pub struct LongValues;

impl LongValues {
    /// Creates an empty cache.
    pub fn cache(spec: LayerSpec) -> Result<StoreCache<DenseStore, Self>> {
        let store = DenseStore::new(spec.shape, DType::F16)?;
        StoreCache::with_strategy(spec, store, Self)
    }
}

impl CacheStrategy<DenseStore> for LongValues {
    fn attend(&self, spec: &LayerSpec, store: &mut DenseStore, step: &Step<'_>) -> Result<Tensor> {
        store.append(step.batch, step.k, step.v)?;
        let state = store.attend(step.batch, step.q, Mask::Causal)?;
        spec.output(state, step.q.dtype())
    }

    fn evict(&self, spec: &LayerSpec, store: &mut DenseStore, batch: &Batch) -> Result<()> {
        for (seq, _) in batch.iter().filter(|(_, tokens)| tokens.len() > 1) {
            let heads = 0..spec.shape.kv_heads;
            let keep = heads.map(|head| longest_half(store, seq, head)).collect::<Result<_>>()?;
            store.retain(seq, &Selection::new(keep))?;
        }
        Ok(())
    }
}

/// Returns the half of a head's entries whose values have the largest norms, in order.
fn longest_half(store: &DenseStore, seq: SeqId, head: usize) -> Result<Vec<u32>> {
    let (_, values) = store.read(seq, head)?;
    let norms = values.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?;
    let mut entries: Vec<_> = (0..norms.len() as u32).collect();
    entries.sort_by(|&a, &b| norms[b as usize].total_cmp(&norms[a as usize]));
    entries.truncate(norms.len().div_ceil(2));
    entries.sort();
    Ok(entries)
}

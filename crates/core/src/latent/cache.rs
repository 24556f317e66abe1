use super::LatentStore;
use crate::{
    AttentionState, Batch, CacheStrategy, Error, KvStore, LayerSpec, Mask, Result, Step,
    StoreCache, attention,
};
use candle_core::Tensor;

/// The cache of a layer with multi-head latent attention. It holds the latent of each token once,
/// in any store.
///
/// Attention among the tokens of a call is exact. Attention to earlier tokens reads the store.
pub type LatentCache<S> = StoreCache<LatentStore<S>, LatentStrategy>;

/// The strategy of a [`LatentCache`].
#[derive(Debug, Clone, Copy)]
pub struct LatentStrategy;

impl<S: KvStore> StoreCache<LatentStore<S>, LatentStrategy> {
    /// Creates an empty cache.
    ///
    /// # Errors
    /// [`Error::Setting`] if the layer has no latent attention; errors of
    /// [`with_strategy`](StoreCache::with_strategy).
    pub fn new(spec: LayerSpec, store: LatentStore<S>) -> Result<Self> {
        if !spec.latent {
            let got = "separate keys and values";
            return Err(Error::setting("attention of the layer", "latent attention", got));
        }
        Self::with_strategy(spec, store, LatentStrategy)
    }
}

impl<S: KvStore> CacheStrategy<LatentStore<S>> for LatentStrategy {
    fn attend(
        &self,
        spec: &LayerSpec,
        store: &mut LatentStore<S>,
        step: &Step<'_>,
    ) -> Result<Tensor> {
        let mut state = attention::attend(step.batch, step.q, step.k, step.v, &spec.shape)?;
        if step.batch.seqs().iter().any(|&seq| store.len(seq) > 0) {
            let past = store.attend(step.batch, step.q, Mask::Full)?;
            state = AttentionState::merge(&[state, past])?;
        }
        let out = spec.output(state, step.q.dtype())?;
        store.append(step.batch, step.k, step.v)?;
        Ok(out)
    }

    /// Keeps everything.
    fn evict(&self, _: &LayerSpec, _: &mut LatentStore<S>, _: &Batch) -> Result<()> {
        Ok(())
    }
}

use std::collections::BTreeMap;

use super::LatentStore;
use crate::{
    AttentionState, Batch, Error, Footprint, KvCache, KvStore, LayerSpec, Mask, Result, SeqId,
    Step, attention, check_unseen,
};
use candle_core::Tensor;

/// The cache of a layer with multi-head latent attention, which holds every token's latent once, in
/// any store.
///
/// Attention is exact among a call's tokens, and over the store's numbers before them.
#[derive(Debug, Clone)]
pub struct LatentCache<S> {
    spec: LayerSpec,
    store: LatentStore<S>,
    seen: BTreeMap<SeqId, usize>,
}

impl<S: KvStore> LatentCache<S> {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Setting`] for a layer whose values are not a part of its keys, or a store that holds
    /// something; [`Error::Mismatch`] for a store of another shape.
    pub fn new(spec: LayerSpec, store: LatentStore<S>) -> Result<Self> {
        if !spec.latent {
            let got = "keys and values of their own";
            return Err(Error::setting("attention of the layer", "latent attention", got));
        }
        if store.shape() != &spec.shape {
            let (expected, got) = (format!("{:?}", spec.shape), format!("{:?}", store.shape()));
            return Err(Error::mismatch("the store's shape", expected, got));
        }
        match store.seqs().len() {
            0 => Ok(Self { spec, store, seen: BTreeMap::new() }),
            n => Err(Error::setting("store", "an empty store", format!("{n} sequences"))),
        }
    }

    /// The latents, with their keys rotated.
    pub fn store(&self) -> &LatentStore<S> {
        &self.store
    }

    fn advance(&mut self, batch: &Batch) {
        for (seq, tokens) in batch.iter() {
            *self.seen.entry(seq).or_default() += tokens.len();
        }
    }
}

impl<S: KvStore> KvCache for LatentCache<S> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        let (q, k) = step.rotate(&self.spec, |seq| self.seen(seq))?;
        let mut state = attention::attend(step.batch, &q, &k, step.v, &self.spec.shape)?;
        if step.batch.seqs().iter().any(|&seq| self.store.len(seq) > 0) {
            let past = self.store.attend(step.batch, &q, Mask::Full)?;
            state = AttentionState::merge(&[state, past])?;
        }
        let out = self.spec.output(state, step.q.dtype())?;
        self.store.append(step.batch, &k, step.v)?;
        self.advance(step.batch);
        Ok(out)
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        self.store.append(step.batch, &k, step.v)?;
        self.advance(step.batch);
        Ok(())
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
        match self.seen.contains_key(&seq) {
            true => self.store.check_truncate(seq, len),
            false => Err(Error::UnknownSequence(seq)),
        }
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        self.store.truncate(seq, len)?;
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

//! Decoded tokens after which nothing is evicted: their step only appends and attends. Prepared
//! decode steps.

use super::PolicyCache;
use crate::{EvictionPolicy, storage::marks};
use candle_core::Tensor;
use longctx_core::{
    Batch, KvStore, PreparedDecode, Result, SeqId, Step, StepLists, append_and_attend,
};

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Returns whether a call only appends entries: it has one token of each sequence, after the
    /// prompts, and decoded tokens are neither scored nor evicted.
    pub(super) fn only_appends(&self, batch: &Batch) -> bool {
        let unscored = self.settings.decode_step.is_none() && !self.needs.previous_scores;
        unscored && batch.iter().all(|(seq, own)| self.decodes(seq, own.len()))
    }

    /// Appends and attends. Nothing is evicted.
    pub(super) fn append_and_attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let (q, k) = step.rotate(&self.spec, |seq| self.next_position(seq))?;
        let rotated = Step { q: &q, k: &k, ..*step };
        let out = append_and_attend(&self.spec, &mut self.store, &rotated)?;
        step.batch.seqs().iter().for_each(|&seq| self.sequences.advance(seq, 1));
        Ok(out)
    }

    /// Launches the kernels of a prepared step, whose lists are at this address.
    #[cfg(feature = "cuda")]
    #[allow(unsafe_code)]
    pub(super) fn attend_prepared(&mut self, step: &Step<'_>, lists: u64) -> Result<Tensor> {
        // SAFETY: the lists are those that `prepare_decode` has made for this batch, as the caller of
        // `Batch::with_prepared` guarantees. They have a position for each token at this offset.
        let (q, k) = unsafe { step.rotate_at(&self.spec, lists + self.prepared.positions) }?;
        if !self.prepared.evicts {
            return append_and_attend(&self.spec, &mut self.store, &Step { q: &q, k: &k, ..*step });
        }
        self.store.append(step.batch, &k, step.v)?;
        Ok(self.store.attend_and_evict(step.batch, &q, step.q.dtype(), &[])?.0)
    }

    pub(super) fn prepares_decode(&self, batch: &Batch) -> bool {
        self.spec.rotates_on_cuda()
            && self.store.prepares_decode()
            && self.sequences.check(batch).is_ok()
            && (self.only_appends(batch) || self.prepares_evict(batch))
    }

    /// Returns whether a prepared step can evict: its inputs are on the device already.
    fn prepares_evict(&self, batch: &Batch) -> bool {
        let on_device = |&seq: &SeqId| self.metadata(seq).device().is_some();
        self.evicts_one(batch) && batch.seqs().iter().all(on_device)
    }
}

impl<S: KvStore, P: EvictionPolicy> PreparedDecode for PolicyCache<S, P> {
    fn prepare_decode(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        self.prepared.positions = lists.push_positions(batch, |seq| self.next_position(seq));
        self.prepared.evicts = !self.only_appends(batch);
        lists.push_size(self.prepared.evicts.into());
        let marks = self.prepared.evicts.then(|| marks(&self.store, batch));
        self.store.prepare_decode(batch, lists)?;
        self.add_tokens(batch);
        if let Some(marks) = marks {
            let done = self.prepare_evict(batch, lists);
            return done.map_err(|error| self.roll_back(batch, &marks, error));
        }
        batch.seqs().iter().for_each(|&seq| self.sequences.advance(seq, 1));
        Ok(())
    }
}

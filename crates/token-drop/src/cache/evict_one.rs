//! Decoded tokens that each evict one entry: a CUDA device scores and evicts in one launch.

use std::collections::BTreeMap;

use super::PolicyCache;
use crate::{EvictionPolicy, ReducedHeads};
use candle_core::{Device, Tensor};
use longctx_core::{Batch, Error, EvictOne, KeptEntries, KvStore, Result, SeqId, Step, StepLists};

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Returns whether a call has one token of each sequence, after the prompts, of which each
    /// evicts one entry of each head by its attention, and the store does this in one launch.
    ///
    /// Entries are then no longer in the order of their positions. Selection on the device does not
    /// need that order, except that the newest entry is the last one.
    pub(super) fn evicts_one(&self, batch: &Batch) -> bool {
        self.reduced_attention().is_some_and(|scores| scores.newest <= 1)
            && self.spec.sink_logits.is_none()
            && batch.iter().all(|(seq, own)| self.decodes(seq, own.len()))
            && self.store.evicts_one(batch.seqs())
            && batch.seqs().iter().all(|&seq| self.drops_one(seq))
    }

    /// Returns whether the next token of a sequence evicts one entry of each head.
    fn drops_one(&self, seq: SeqId) -> bool {
        let lens: Vec<_> = self.metadata(seq).lens().iter().map(|len| len + 1).collect();
        let limits = self.limits_of(seq, 1, &lens);
        let budget = limits.common_budget(self.settings.granularity, self.settings.head_budgets);
        let one = |len: &usize| budget.is_some_and(|budget| budget + 1 == *len);
        limits.evicts && lens.iter().all(one)
    }

    /// Attends and evicts one entry of each head of all sequences.
    pub(super) fn attend_and_evict_one(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let (q, k) = step.rotate(&self.spec, |seq| self.next_position(seq))?;
        self.store.append(step.batch, &k, step.v)?;
        let evictions = self.evictions(step.batch, Some(q.device()))?;
        let dtype = step.q.dtype();
        let (out, kept) = self.store.attend_and_evict(step.batch, &q, dtype, &evictions)?;
        self.keep(step.batch, kept);
        Ok(out)
    }

    /// Adds the eviction to a prepared step.
    pub(super) fn prepare_evict(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        let mut evictions = self.evictions(batch, None)?;
        for (seq, eviction) in batch.seqs().iter().zip(&mut evictions) {
            eviction.outputs = self.prepared.replaced.remove(seq);
        }
        let kept = self.store.prepare_evict(batch, &evictions, lists)?;
        self.prepared.replaced = self.keep(batch, kept);
        self.prepared.evictions = evictions;
        Ok(())
    }

    /// Returns the evictions after the tokens of a batch were added. `device`: where positions and
    /// scores are needed; `None`: they are on a device.
    fn evictions(&self, batch: &Batch, device: Option<&Device>) -> Result<Vec<EvictOne>> {
        let none = || Error::Unsupported("eviction by attention with this policy".into());
        let scores = self.reduced_attention().ok_or_else(none)?;
        let eviction = |&seq: &SeqId| {
            let (limits, entries) = (self.limits(seq, 1), self.metadata(seq));
            let device = device.or_else(|| entries.device()).unwrap_or(&Device::Cpu);
            Ok(EvictOne {
                of_layer: scores.heads == ReducedHeads::Layer,
                ranking: self.ranking(seq, &limits, scores, device)?,
                carries_scores: self.needs.previous_scores,
                outputs: None,
            })
        };
        batch.seqs().iter().map(eviction).collect()
    }

    /// Replaces the entries of the sequences of a batch, and counts its tokens. Returns the memory of
    /// the replaced entries.
    fn keep(&mut self, batch: &Batch, kept: Vec<KeptEntries>) -> BTreeMap<SeqId, KeptEntries> {
        let mut replaced = BTreeMap::new();
        for (&seq, kept) in batch.seqs().iter().zip(kept) {
            self.sequences.advance(seq, 1);
            if let Some(sequence) = self.sequences.get_mut(seq) {
                let before = sequence.state.metadata.keep_on_device(kept.positions, kept.scores);
                replaced.extend(before.map(|before| (seq, before)));
                sequence.state.seen_at_eviction = sequence.seen;
            }
        }
        replaced
    }
}

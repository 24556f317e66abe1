//! Scores and selection of all decoded sequences of a call in one launch on a CUDA device.

use std::collections::BTreeMap;

use super::PolicyCache;
use super::plan::Plan;
use crate::metadata::Kept;
use crate::scores::Scores;
use crate::select::Limits;
use crate::sub_batch::SubBatch;
use crate::{EvictionPolicy, ObservedQueries, ReducedAttention, ReducedHeads};
use candle_core::{Device, Tensor};
use longctx_core::{
    AttentionSums, Batch, Candidates, KvStore, Mask, Ranking, Result, SeqId, TopEntries,
    top_entries,
};

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Plans the eviction of the decoded sequences of a batch that are scored and selected on the
    /// device. The others are left out: [`plan`](Self::plan) handles each of them.
    pub(super) fn plan_decoded(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: Option<&Tensor>,
    ) -> Result<BTreeMap<SeqId, Plan>> {
        let scores = self.reduced_attention().filter(|_| q.device().is_cuda());
        let (Some(scores), Some(lse)) = (scores, lse) else { return Ok(BTreeMap::new()) };
        let mut limits = BTreeMap::new();
        for (seq, own) in batch.iter() {
            let of = self.limits(seq, own.len());
            if self.is_scored_on_device(seq, &of) {
                limits.insert(seq, of);
            }
        }
        let part = SubBatch::of_sequences(batch, |seq, _| limits.contains_key(&seq))?;
        let Some(part) = part else { return Ok(BTreeMap::new()) };
        let (q, lse) = (part.rows(q)?, part.rows(lse)?);
        let sums = self.store.attention_sums(&part.batch, &q, &lse, Mask::Causal)?;
        let candidates = part.batch.seqs().iter().zip(&sums);
        let candidates =
            candidates.map(|(seq, sums)| self.candidates(*seq, sums, &limits[seq], scores));
        let top = top_entries(&candidates.collect::<Result<Vec<_>>>()?)?.unwrap_or_default();
        let plan = |(&seq, top): (&SeqId, TopEntries)| {
            let mut plan = Plan::new(seq, 1);
            let all = Scores::OnDevice(top.all_scores);
            plan.scores = self.needs.previous_scores.then_some(all);
            if limits[&seq].evicts {
                plan.keep = Some(top.entries);
                plan.kept = Some(Kept { positions: top.positions, scores: top.scores });
            }
            (seq, plan)
        };
        Ok(part.batch.seqs().iter().zip(top).map(plan).collect())
    }

    /// Returns how the scores of decoded tokens follow from their attention, if a device can score
    /// all sequences in one launch.
    pub(super) fn reduced_attention(&self) -> Option<ReducedAttention> {
        let one_query = match self.needs.attention? {
            ObservedQueries::Call => true,
            ObservedQueries::Newest { queries, by_position } => queries == 1 && !by_position,
        };
        let joint = one_query && !self.settings.rerotate;
        self.policy.reduced_attention().filter(|_| joint && self.num_kept_queries() == 0)
    }

    /// Returns whether the device scores and selects a sequence's entries: scores are needed, and
    /// all heads have equally many entries and the same budget.
    fn is_scored_on_device(&self, seq: SeqId, limits: &Limits) -> bool {
        let lens = self.metadata(seq).lens();
        let equal = lens.iter().all(|len| *len == lens[0]);
        let budget = limits.common_budget(self.settings.granularity, self.settings.head_budgets);
        equal && budget.is_some() && (limits.evicts || self.needs.previous_scores)
    }

    fn candidates(
        &self,
        seq: SeqId,
        sums: &AttentionSums,
        limits: &Limits,
        scores: ReducedAttention,
    ) -> Result<Candidates> {
        let kv_heads = self.spec.shape.kv_heads;
        let sums = sums.heads(0..kv_heads)?;
        let len = sums.dim(2)?;
        Ok(Candidates {
            kv_heads,
            ranking: self.ranking(seq, limits, scores, sums.device())?,
            scores: match scores.heads {
                ReducedHeads::Group => sums,
                ReducedHeads::Layer => sums.reshape((1, (), len))?,
            },
            count: if limits.evicts { limits.budgets[0].min(len) } else { len },
        })
    }

    /// Returns how a sequence's entries are ranked by their attention.
    pub(super) fn ranking(
        &self,
        seq: SeqId,
        limits: &Limits,
        scores: ReducedAttention,
        device: &Device,
    ) -> Result<Ranking> {
        let entries = self.metadata(seq);
        let (positions, next_position) = entries.kept_positions(device)?;
        let previous = match self.needs.previous_scores {
            true => entries.scores(0..self.spec.shape.kv_heads, device)?,
            false => None,
        };
        Ok(Ranking {
            reduction: scores.reduction.of_rows(),
            previous,
            positions,
            next_position,
            sinks: limits.protected.sinks,
            recent: limits.protected.recent.max(scores.newest),
        })
    }
}

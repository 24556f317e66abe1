//! Plans the eviction after a call.

use super::PolicyCache;
use super::score::CallTensors;
use crate::metadata::Kept;
use crate::select::{Limits, select};
use crate::{EvictionPolicy, Prefill, scores::Scores};
use candle_core::Tensor;
use longctx_core::{KvStore, Result, Selection, SeqId};

/// The changes of one call to one sequence, made after its attention is computed.
#[derive(Debug)]
pub struct Plan {
    pub seq: SeqId,
    pub tokens: usize,
    /// The newest queries to keep.
    pub queries: Option<Tensor>,
    /// The scores for the policy's next call.
    pub scores: Option<Scores>,
    /// The entries to keep, of the store's entries followed by the call's tokens; `None`: all.
    pub keep: Option<Selection>,
    /// The metadata of these, if they were selected on a device.
    pub kept: Option<Kept>,
    /// Whether only the kept tokens of the call were appended to the store.
    pub selected: bool,
}

impl Plan {
    /// Creates a plan that keeps all entries.
    pub fn new(seq: SeqId, tokens: usize) -> Self {
        let (queries, scores, keep, kept) = (None, None, None, None);
        Self { seq, tokens, queries, scores, keep, kept, selected: false }
    }

    /// Returns the kept tokens of the call, if each head held `old` entries before; all of them if
    /// nothing is evicted.
    pub fn kept_of_call(&self, old: &[usize], kv_heads: usize) -> Result<Selection> {
        let Some(keep) = &self.keep else {
            return Ok(Selection::uniform(kv_heads, (0..self.tokens as u32).collect()));
        };
        if old.iter().all(|len| *len == 0) {
            return Ok(keep.clone());
        }
        let own = |(head, kept): (usize, &Vec<u32>)| {
            let old = old.get(head).map_or(0, |&len| len as u32);
            kept.iter().filter_map(|entry| entry.checked_sub(old)).collect()
        };
        Ok(Selection::new(keep.heads()?.iter().enumerate().map(own).collect()))
    }

    /// Returns whether the kept tokens of the call are known only on a device, among `old` entries.
    pub fn is_mixed_on_device(&self, old: &[usize]) -> bool {
        let on_device = self.keep.as_ref().is_some_and(|keep| keep.entries().is_some());
        on_device && old.iter().any(|len| *len > 0)
    }
}

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Returns whether the token of a call is appended to the store before it attends: a single
    /// token after others.
    pub(super) fn appends_first(&self, seq: SeqId, tokens: usize) -> bool {
        tokens == 1 && self.store.len(seq) > 0
    }

    /// Returns whether a call is one token after a sequence's prompt.
    pub(super) fn decodes(&self, seq: SeqId, tokens: usize) -> bool {
        let seen = self.sequences.seen(seq);
        let prompt = self.sequences.prompt(seq);
        self.appends_first(seq, tokens) && !prompt.contains_call(tokens, seen)
    }

    /// Returns whether a call belongs to a prompt and is followed by eviction.
    pub(super) fn evicts_after_prefill(&self, seq: SeqId, tokens: usize) -> bool {
        let seen = self.sequences.seen(seq);
        let prompt = self.sequences.prompt(seq).contains_call(tokens, seen);
        prompt && (seen == 0 || self.settings.prefill == Prefill::EveryCall)
    }

    /// Returns the number of entries to evict at a time if a head is over its budget; `None`: no
    /// eviction.
    fn eviction_step(&self, seq: SeqId, tokens: usize) -> Option<usize> {
        let seen = self.sequences.seen(seq);
        match self.sequences.prompt(seq).contains_call(tokens, seen) {
            true => self.evicts_after_prefill(seq, tokens).then_some(1),
            false => self.settings.decode_step,
        }
    }

    /// Returns the numbers of entries that a sequence may hold after a call of `tokens` tokens.
    pub(super) fn limits(&self, seq: SeqId, tokens: usize) -> Limits {
        self.limits_of(seq, tokens, &self.metadata(seq).lens())
    }

    /// As [`limits`](Self::limits), if the heads hold `lens` entries with those of the call.
    pub(super) fn limits_of(&self, seq: SeqId, tokens: usize, lens: &[usize]) -> Limits {
        let seen = self.sequences.seen(seq) + tokens;
        let prompt = self.sequences.prompt_with(seq, tokens).len();
        let (mut budgets, protected) = self.settings.limits(&self.spec, prompt, seen);
        let over = self.settings.head_budgets.is_over(lens, &budgets);
        let step = self.eviction_step(seq, tokens).filter(|_| over);
        if let Some(step) = step {
            let min = protected.total().max(1);
            budgets.iter_mut().for_each(|b| *b = b.saturating_sub(step - 1).max(min));
        }
        Limits { budgets, protected, evicts: step.is_some() }
    }

    /// Scores a sequence if the policy needs it, and selects entries if it is over its budget.
    pub(super) fn plan(&self, call: &CallTensors) -> Result<Plan> {
        let (seq, tokens) = (call.seq, call.tokens());
        let queries = self.newest_queries(call)?;
        let mut plan = Plan::new(seq, tokens);
        let limits = self.limits(seq, tokens);
        if limits.evicts || self.needs.previous_scores {
            let scores = self.score(call, queries.as_ref())?;
            if limits.evicts {
                let (granularity, heads) = (self.settings.granularity, self.settings.head_budgets);
                let entries = self.metadata(seq);
                let (keep, kept) = select(&scores, &limits, entries, granularity, heads)?;
                (plan.keep, plan.kept) = (Some(keep), kept);
            }
            plan.scores = self.needs.previous_scores.then_some(scores);
        }
        plan.queries = queries;
        Ok(plan)
    }

    /// Returns the newest queries including those of the call, if the policy observes them during
    /// decoding.
    fn newest_queries(&self, call: &CallTensors) -> Result<Option<Tensor>> {
        let wanted = self.num_kept_queries();
        if wanted == 0 {
            return Ok(None);
        }
        let old = self.sequences.get(call.seq).and_then(|s| s.state.queries.as_ref());
        let all = match old {
            Some(old) => Tensor::cat(&[old, &call.unrotated_q], 0)?,
            None => call.unrotated_q.clone(),
        };
        let len = all.dim(0)?;
        let count = wanted.min(len);
        // A copy, so that a view of the last queries does not keep the whole prompt's queries
        // alive.
        Ok(Some(all.narrow(0, len - count, count)?.force_contiguous()?))
    }
}

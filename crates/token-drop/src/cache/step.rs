//! Processes a call: attention, scores, selection and the changes to the store.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::Plan;
use super::score::CallTensors;
use super::{PolicyCache, SeqState};
use crate::{
    EvictionPolicy,
    storage::{lse_with_sink_logits, truncate_heads},
    sub_batch::{SubBatch, assemble},
};
use candle_core::Tensor;
use longctx_core::{
    AttentionState, Batch, Error, KvStore, Mask, Result, Selection, SeqId, Step, attention,
};

/// Kept keys `[kept, kv_heads, head_dim]`, rotated to contiguous positions, and values, by
/// sequence.
type Rewritten = BTreeMap<SeqId, (Tensor, Tensor)>;

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Adds a call's tokens to the metadata of the entries. Returns the number of entries that each
    /// head of the sequences held before.
    pub(super) fn begin(&mut self, batch: &Batch) -> Vec<Vec<usize>> {
        let kv_heads = self.spec.shape.kv_heads;
        let begin = |(seq, tokens): (SeqId, std::ops::Range<usize>)| {
            let sequence = self.sequences.begin(seq, || SeqState::new(kv_heads));
            sequence.state.metadata.add(sequence.seen..sequence.seen + tokens.len());
            self.store.lens(seq)
        };
        batch.iter().map(begin).collect()
    }

    /// Restores the state before a failed call. Sequences that cannot be restored are poisoned.
    pub(super) fn roll_back(&mut self, batch: &Batch, lens: &[Vec<usize>], error: Error) -> Error {
        if self.sequences.check(batch).is_err() {
            return error;
        }
        for ((seq, tokens), lens) in batch.iter().zip(lens) {
            if truncate_heads(&mut self.store, seq, lens).is_err() {
                return self.sequences.poison(batch, error);
            }
            match self.sequences.get_mut(seq) {
                Some(sequence) if !lens.is_empty() => {
                    sequence.state.metadata.drop_newest(tokens.len());
                }
                _ => self.sequences.forget(seq),
            }
        }
        error
    }

    /// Attends and keeps the selected entries.
    pub(super) fn attend_and_evict(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let (q, k) = step.rotate(&self.spec, |seq| self.next_position(seq))?;
        let joins =
            |(seq, own): &(SeqId, std::ops::Range<usize>)| self.appends_first(*seq, own.len());
        let appended_first: BTreeSet<_> =
            step.batch.iter().filter(joins).map(|(seq, _)| seq).collect();
        let prompts = SubBatch::of_sequences(step.batch, |seq, _| !appended_first.contains(&seq))?;
        let decoded = SubBatch::of_sequences(step.batch, |seq, _| appended_first.contains(&seq))?;
        let mut parts = Vec::new();
        if let Some(part) = &prompts {
            parts.push((part, self.attend_prompts(step, &q, &k, part)?));
        }
        if let Some(part) = &decoded {
            self.store.append(&part.batch, &part.rows(&k)?, &part.rows(step.v)?)?;
            parts.push((part, self.store.attend(&part.batch, &part.rows(&q)?, Mask::Causal)?));
        }
        let whole = assemble(&parts, step.batch.tokens())?;
        let lse =
            self.needs.attention.map(|_| lse_with_sink_logits(&whole, &self.spec)).transpose()?;
        let out = self.spec.output(whole, step.q.dtype())?;
        self.score_and_evict(step, (&q, &k), lse.as_ref(), &appended_first)?;
        Ok(out)
    }

    /// Appends prompts whose attention was computed by the engine.
    pub(super) fn append_attended(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        let (q, k) = step.rotate(&self.spec, |_| 0)?;
        self.score_and_evict(
            step,
            (&q, &k),
            lse.filter(|_| self.needs.attention.is_some()),
            &BTreeSet::new(),
        )
    }

    /// Exact attention among each sequence's own tokens, and over its kept entries.
    fn attend_prompts(
        &self,
        step: &Step<'_>,
        q: &Tensor,
        k: &Tensor,
        part: &SubBatch,
    ) -> Result<AttentionState> {
        let (batch, shape) = (&part.batch, &self.spec.shape);
        let (q, k, v) = (part.rows(q)?, part.rows(k)?, part.rows(step.v)?);
        let mut parts = vec![attention::attend(batch, &q, &k, &v, shape)?];
        if batch.seqs().iter().any(|&seq| self.store.len(seq) > 0) {
            parts.push(self.store.attend(batch, &q, Mask::Full)?);
        }
        AttentionState::merge(&parts)
    }

    /// Scores and selects for every sequence, and then changes the store.
    fn score_and_evict(
        &mut self,
        step: &Step<'_>,
        (q, k): (&Tensor, &Tensor),
        lse: Option<&Tensor>,
        appended_first: &BTreeSet<SeqId>,
    ) -> Result<()> {
        let (mut plans, mut rewritten) = (Vec::new(), Rewritten::new());
        let is_decoded = |seq| appended_first.contains(&seq);
        let mut on_device = self.plan_decoded(step.batch, q, lse, is_decoded)?;
        for (seq, tokens) in step.batch.iter() {
            if let Some(plan) = on_device.remove(&seq) {
                plans.push(plan);
                continue;
            }
            let call = CallTensors::new(step, (q, k), lse, (seq, tokens), is_decoded(seq))?;
            let plan = self.plan(&call)?;
            if let Some(keep) = plan.keep.as_ref().filter(|_| self.settings.rerotate) {
                rewritten.insert(seq, self.rewrite(&call, keep)?);
            }
            plans.push(plan);
        }
        self.append_prompts(step, k, &mut plans)?;
        for (&seq, (k, v)) in &rewritten {
            // Appends only the rows beyond the current length first. This fails if there is no
            // room, while everything can still be restored.
            let held = self.store.len(seq);
            if let Some(more) = k.dim(0)?.checked_sub(held).filter(|more| *more > 0) {
                let part = |x: &Tensor| x.narrow(0, held, more);
                self.store.append(&Batch::single(seq, more)?, &part(k)?, &part(v)?)?;
            }
        }
        self.finish(plans, &rewritten).map_err(|error| self.sequences.poison(step.batch, error))
    }

    /// Returns kept keys `[kept, kv_heads, head_dim]`, rotated to contiguous positions, and values.
    ///
    /// Before, entry i was at position i, without gaps.
    fn rewrite(&self, call: &CallTensors, keep: &Selection) -> Result<(Tensor, Tensor)> {
        let rope = self.spec.require_rope("re-rotation")?;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (head, kept) in keep.heads()?.iter().enumerate() {
            let (k, v) = self.head_keys_values(call, head)?;
            let rows = Tensor::new(kept.as_slice(), k.device())?;
            let moves: Vec<_> = (0..).zip(kept).map(|(to, &from)| to - i64::from(from)).collect();
            let kept = |x: &Tensor| x.contiguous()?.index_select(&rows, 0)?.unsqueeze(1);
            keys.push(rope.apply(&kept(&k)?, &moves)?);
            values.push(kept(&v)?);
        }
        let device = call.k.device();
        Ok((Tensor::cat(&keys, 1)?.to_device(device)?, Tensor::cat(&values, 1)?.to_device(device)?))
    }

    /// Appends the kept tokens of prompts, except those of sequences that are rewritten.
    fn append_prompts(&mut self, step: &Step<'_>, k: &Tensor, plans: &mut [Plan]) -> Result<()> {
        let rerotate = self.settings.rerotate;
        let appends = |plan: &Plan| !(plan.in_store || rerotate && plan.keep.is_some());
        let appended: BTreeSet<_> = plans.iter().filter(|p| appends(p)).map(|p| p.seq).collect();
        let Some(part) = SubBatch::of_sequences(step.batch, |seq, _| appended.contains(&seq))?
        else {
            return Ok(());
        };
        let (k, v) = (part.rows(k)?, part.rows(step.v)?);
        let mut plans: Vec<_> = plans.iter_mut().filter(|p| appends(p)).collect();
        let mixed = |plan: &&mut Plan| plan.is_mixed_on_device(&self.store.lens(plan.seq));
        if plans.iter().all(|plan| plan.keep.is_none()) || plans.iter().any(mixed) {
            return self.store.append(&part.batch, &k, &v);
        }
        let kv_heads = self.spec.shape.kv_heads;
        let own = |plan: &&mut Plan| plan.kept_of_call(&self.store.lens(plan.seq), kv_heads);
        let selected = plans.iter().map(own).collect::<Result<Vec<_>>>()?;
        match self.store.append_selected(&part.batch, &k, &v, &selected) {
            Ok(()) => {
                plans.iter_mut().for_each(|plan| plan.selected = plan.keep.is_some());
                Ok(())
            }
            // Stores with one tensor for all heads can only append whole tokens; the others are
            // dropped afterwards.
            Err(Error::Unsupported(_)) => self.store.append(&part.batch, &k, &v),
            Err(error) => Err(error),
        }
    }

    /// Drops the evicted entries and counts the call's tokens.
    fn finish(&mut self, plans: Vec<Plan>, rewritten: &Rewritten) -> Result<()> {
        let mut evictions = Vec::new();
        for plan in &plans {
            match rewritten.get(&plan.seq) {
                Some(rows) => self.replace(plan.seq, rows)?,
                None => evictions.extend(self.eviction(plan)?),
            }
        }
        let keep: Vec<_> = evictions.iter().map(|of| (of.seq, of.keep.clone())).collect();
        let done = self.store.retain_each(&keep)?;
        let postponed = evictions.into_iter().zip(done).filter(|(_, done)| !done);
        let mut postponed: BTreeMap<_, _> = postponed.map(|(of, _)| (of.seq, of.all)).collect();
        for plan in plans {
            let all = postponed.remove(&plan.seq);
            self.update_state(plan, all)?;
        }
        Ok(())
    }

    /// Updates the state of a sequence whose store has changed. `all` are the entries that are
    /// still there if the eviction was postponed.
    fn update_state(&mut self, plan: Plan, all: Option<Selection>) -> Result<()> {
        let Plan { seq, tokens, queries, scores, keep, kept, .. } = plan;
        self.sequences.advance(seq, tokens);
        let Some(sequence) = self.sequences.get_mut(seq) else { return Ok(()) };
        if let Some(scores) = scores {
            sequence.state.metadata.set_scores(scores);
        }
        if let Some(keep) = keep {
            match all {
                Some(all) => sequence.state.metadata.retain(&all, None)?,
                None => sequence.state.metadata.retain(&keep, kept)?,
            }
            sequence.state.seen_at_eviction = sequence.seen;
        }
        sequence.state.queries = queries;
        Ok(())
    }

    /// Replaces a sequence's entries with rewritten rows. A new sequence holds them already.
    fn replace(&mut self, seq: SeqId, (k, v): &(Tensor, Tensor)) -> Result<()> {
        if self.sequences.seen(seq) == 0 {
            return Ok(());
        }
        self.store.truncate(seq, 0)?;
        self.store.append(&Batch::single(seq, k.dim(0)?)?, k, v)
    }

    /// Returns the entries that a plan keeps in the store; `None` if it evicts none of them.
    fn eviction(&self, plan: &Plan) -> Result<Option<Eviction>> {
        let (seq, lens) = (plan.seq, self.store.lens(plan.seq));
        let Some(keep) = &plan.keep else { return Ok(None) };
        let eviction = match plan.selected {
            false => {
                let all = lens.iter().map(|&len| (0..len as u32).collect());
                Eviction { seq, keep: keep.clone(), all: Selection::new(all.collect()) }
            }
            true => {
                let before = self.metadata(seq).lens();
                let old: Vec<_> = before.iter().map(|len| len - plan.tokens).collect();
                if old.iter().all(|len| *len == 0) {
                    return Ok(None);
                }
                Eviction::of_old(seq, keep, &old, &lens)?
            }
        };
        Ok(Some(eviction).filter(|eviction| eviction.keep.lens() != lens))
    }
}

/// The entries of a sequence to keep in the store.
struct Eviction {
    seq: SeqId,
    /// Entries to keep, of those in the store.
    keep: Selection,
    /// Entries that the store holds if the eviction is postponed: of the old entries followed by
    /// the call's tokens.
    all: Selection,
}

impl Eviction {
    /// Evicts old entries; of the call's tokens, the store holds only those to keep.
    fn of_old(seq: SeqId, keep: &Selection, old: &[usize], lens: &[usize]) -> Result<Self> {
        let (mut stays, mut all) = (Vec::new(), Vec::new());
        for ((kept, &old), &len) in keep.heads()?.iter().zip(old).zip(lens) {
            let (of_old, new) = kept.split_at(kept.partition_point(|&e| (e as usize) < old));
            stays.push(of_old.iter().copied().chain(old as u32..len as u32).collect());
            all.push((0..old as u32).chain(new.iter().copied()).collect());
        }
        Ok(Self { seq, keep: Selection::new(stays), all: Selection::new(all) })
    }
}

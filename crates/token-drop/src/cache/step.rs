//! Processes a call: attention, scores, selection and the changes to the store.

use std::collections::BTreeMap;
use std::ops::Range;

use super::plan::Plan;
use super::score::CallTensors;
use super::{PolicyCache, SeqState};
use crate::{
    EvictionPolicy,
    storage::{lse_with_sink_logits, restore},
    sub_batch::{SubBatch, assemble},
};
use candle_core::Tensor;
use longctx_core::{
    AttentionState, Batch, Error, KvStore, Mark, Mask, Result, Selection, SeqId, Step, attention,
};

/// Kept keys `[kept, kv_heads, head_dim]`, rotated to contiguous positions, and values, by
/// sequence.
type Rewritten = BTreeMap<SeqId, (Tensor, Tensor)>;

/// The changes of a call to its sequences.
#[derive(Debug, Default)]
struct Planned {
    plans: Vec<Plan>,
    rewritten: Rewritten,
}

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// Adds a call's tokens to the metadata of the entries.
    pub(super) fn add_tokens(&mut self, batch: &Batch) {
        let kv_heads = self.spec.shape.kv_heads;
        for (seq, tokens) in batch.iter() {
            let sequence = self.sequences.begin(seq, || SeqState::new(kv_heads));
            sequence.state.metadata.add(sequence.seen..sequence.seen + tokens.len());
        }
    }

    /// Restores the state before a failed call. Sequences that cannot be restored are poisoned.
    pub(super) fn roll_back(&mut self, batch: &Batch, marks: &[Mark], error: Error) -> Error {
        if self.sequences.check(batch).is_err() {
            return error;
        }
        let lost = restore(&mut self.store, batch, marks);
        for ((seq, tokens), mark) in batch.iter().zip(marks) {
            match self.sequences.get_mut(seq) {
                Some(sequence) if !mark.lens.is_empty() => {
                    sequence.state.metadata.drop_newest(tokens.len());
                }
                _ => self.sequences.forget(seq),
            }
        }
        self.sequences.poison(&lost, error)
    }

    /// Attends and keeps the selected entries.
    ///
    /// All sequences are appended in one operation of the store, once the prompts are planned. So
    /// a full pool or a number that cannot be packed is an error before anything has changed: a
    /// packed store cannot always take back what it has packed.
    pub(super) fn attend_and_evict(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let (q, k) = step.rotate(&self.spec, |seq| self.next_position(seq))?;
        let appended_first = |seq, tokens| self.appends_first(seq, tokens);
        let prompts = SubBatch::of_sequences(step.batch, |seq, n| !appended_first(seq, n))?;
        let decoded = SubBatch::of_sequences(step.batch, appended_first)?;
        let (mut parts, mut planned) = (Vec::new(), Planned::default());
        if let Some(part) = &prompts {
            let state = self.attend_prompts(step, &q, &k, part)?;
            self.plan_part(step, (&q, &k), (part, false), &state, &mut planned)?;
            parts.push((part, state));
        }
        self.append_planned(step, &k, &mut planned)?;
        if let Some(part) = &decoded {
            let state = self.store.attend(&part.batch, &part.rows(&q)?, Mask::Causal)?;
            self.plan_part(step, (&q, &k), (part, true), &state, &mut planned)?;
            parts.push((part, state));
        }
        let whole = assemble(&parts, step.batch.tokens())?;
        let out = self.spec.output(whole, step.q.dtype())?;
        self.finish(step.batch, planned)?;
        Ok(out)
    }

    /// Appends prompts whose attention was computed by the engine.
    pub(super) fn append_attended(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        let (q, k) = step.rotate(&self.spec, |_| 0)?;
        let lse = lse.filter(|_| self.needs.attention.is_some());
        let mut planned = Planned::default();
        self.plan_sequences(step, (&q, &k), lse, false, &mut planned)?;
        self.append_planned(step, &k, &mut planned)?;
        self.finish(step.batch, planned)
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

    /// Scores and selects for the sequences of a part of the call, from its attention. `in_store`:
    /// whether its tokens are in the store already.
    fn plan_part(
        &self,
        step: &Step<'_>,
        (q, k): (&Tensor, &Tensor),
        (part, in_store): (&SubBatch, bool),
        state: &AttentionState,
        planned: &mut Planned,
    ) -> Result<()> {
        let lse =
            self.needs.attention.map(|_| lse_with_sink_logits(state, &self.spec)).transpose()?;
        let rotated = (&part.rows(q)?, &part.rows(k)?);
        let (q, k, v) = (part.rows(step.q)?, part.rows(step.k)?, part.rows(step.v)?);
        let step = Step { batch: &part.batch, q: &q, k: &k, v: &v };
        self.plan_sequences(&step, rotated, lse.as_ref(), in_store, planned)
    }

    /// Scores and selects for every sequence of a step.
    fn plan_sequences(
        &self,
        step: &Step<'_>,
        (q, k): (&Tensor, &Tensor),
        lse: Option<&Tensor>,
        in_store: bool,
        planned: &mut Planned,
    ) -> Result<()> {
        let mut on_device = match in_store {
            true => self.plan_decoded(step.batch, q, lse)?,
            false => BTreeMap::new(),
        };
        for (seq, tokens) in step.batch.iter() {
            if let Some(plan) = on_device.remove(&seq) {
                planned.plans.push(plan);
                continue;
            }
            let call = CallTensors::new(step, (q, k), lse, (seq, tokens), in_store)?;
            let plan = self.plan(&call)?;
            if let Some(keep) = plan.keep.as_ref().filter(|_| self.settings.rerotate) {
                planned.rewritten.insert(seq, self.rewrite(&call, keep)?);
            }
            planned.plans.push(plan);
        }
        Ok(())
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

    /// Appends a call's tokens to all sequences, or changes nothing. Of prompts it appends only the
    /// kept tokens, if the store can.
    fn append_planned(&mut self, step: &Step<'_>, k: &Tensor, planned: &mut Planned) -> Result<()> {
        let Planned { plans, rewritten } = planned;
        if !rewritten.is_empty() {
            return self.append_with_rewritten(step, k, rewritten);
        }
        let mixed = |plan: &Plan| plan.is_mixed_on_device(&self.store.lens(plan.seq));
        if plans.iter().all(|plan| plan.keep.is_none()) || plans.iter().any(mixed) {
            return self.store.append(step.batch, k, step.v);
        }
        let kv_heads = self.spec.shape.kv_heads;
        let of_seq: BTreeMap<_, _> = plans.iter().map(|plan| (plan.seq, plan)).collect();
        let selected = |(seq, own): (SeqId, Range<usize>)| match of_seq.get(&seq) {
            Some(plan) => plan.kept_of_call(&self.store.lens(seq), kv_heads),
            None => Ok(Selection::uniform(kv_heads, (0..own.len() as u32).collect())),
        };
        let selected = step.batch.iter().map(selected).collect::<Result<Vec<_>>>()?;
        match self.store.append_selected(step.batch, k, step.v, &selected) {
            Ok(()) => {
                plans.iter_mut().for_each(|plan| plan.selected = plan.keep.is_some());
                Ok(())
            }
            // Stores with one tensor for all heads can only append whole tokens; the others are
            // dropped afterwards.
            Err(Error::Unsupported(_)) => self.store.append(step.batch, k, step.v),
            Err(error) => Err(error),
        }
    }

    /// Appends the call's tokens and, of sequences that are rewritten, only the rows beyond their
    /// current length. The others are [replaced](Self::replace) afterwards, which takes no more
    /// room.
    fn append_with_rewritten(
        &mut self,
        step: &Step<'_>,
        k: &Tensor,
        rewritten: &Rewritten,
    ) -> Result<()> {
        let (mut seqs, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let dtype = step.k.dtype();
        for (seq, own) in step.batch.iter() {
            let (k, v, rows) = match rewritten.get(&seq) {
                Some((k, v)) => (k, v, self.store.len(seq).min(k.dim(0)?)..k.dim(0)?),
                None => (k, step.v, own),
            };
            if !rows.is_empty() {
                // Rewritten rows are in f32. A store without sequences takes the dtype of its first
                // rows, which is to be the call's.
                let rows_of = |x: &Tensor| x.narrow(0, rows.start, rows.len())?.to_dtype(dtype);
                keys.push(rows_of(k)?);
                values.push(rows_of(v)?);
                seqs.push((seq, rows.len()));
            }
        }
        match seqs.is_empty() {
            true => Ok(()),
            false => {
                let (k, v) = (Tensor::cat(&keys, 0)?, Tensor::cat(&values, 0)?);
                self.store.append(&Batch::new(&seqs)?, &k, &v)
            }
        }
    }

    /// Drops the evicted entries and counts the call's tokens. A failure midway poisons the
    /// sequences.
    fn finish(&mut self, batch: &Batch, planned: Planned) -> Result<()> {
        let done = self.evict(planned);
        done.map_err(|error| self.sequences.poison(batch.seqs(), error))
    }

    fn evict(&mut self, Planned { plans, rewritten }: Planned) -> Result<()> {
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

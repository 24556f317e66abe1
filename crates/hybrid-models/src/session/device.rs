//! Batches on a device.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Session;
use crate::cuda::{Call, OnDevice};
use crate::recurrent_state::RecurrentState;
use candle_core::Tensor;
use longctx_core::cuda::address;
use longctx_core::{Batch, CausalLm, Error, KvCache, Logits, Result, SeqId};

/// One sequence's part of a batch.
struct GroupEntry {
    /// Its index in the batch.
    index: usize,
    seq: SeqId,
    rows: Range<usize>,
}

/// The result of a call for a sequence.
struct SequenceResult {
    seq: SeqId,
    tokens: usize,
    snapshots: Vec<(usize, RecurrentState)>,
}

impl Session {
    /// Sequences with equally many tokens are processed together, one group after the other. A
    /// prompt that leaves snapshots is processed alone.
    pub(super) fn forward_on_device(
        &mut self,
        model: &OnDevice,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
    ) -> Result<Tensor> {
        if let Some(graphs) = &self.graphs {
            graphs.wait()?;
        }
        for &seq in batch.seqs() {
            if !self.sequences.contains_key(&seq) {
                self.states.set(seq, self.recurrent_state(seq)?)?;
            }
        }
        let (mut outputs, mut order, mut done) = (Vec::new(), Vec::new(), Vec::new());
        for group in self.groups(batch) {
            for GroupEntry { index, rows, .. } in &group {
                match logits {
                    Logits::Last => order.push(*index),
                    Logits::All => order.extend(rows.clone()),
                }
            }
            outputs.push(self.forward_group(model, &group, ids, logits, &mut done)?);
        }
        for SequenceResult { seq, tokens, snapshots } in done {
            self.advance(seq, tokens, snapshots);
        }
        in_order(outputs, &order)
    }

    /// Returns groups of sequences with equally many tokens, all of them new or none.
    fn groups(&self, batch: &Batch) -> Vec<Vec<GroupEntry>> {
        let mut groups: BTreeMap<_, Vec<GroupEntry>> = BTreeMap::new();
        for (index, (seq, rows)) in batch.iter().enumerate() {
            let separate = rows.len() > 1 && !self.snapshot_positions(seq, rows.len()).is_empty();
            let key = (rows.len(), self.seen(seq) == 0, separate.then_some(index));
            groups.entry(key).or_default().push(GroupEntry { index, seq, rows });
        }
        groups.into_values().collect()
    }

    fn forward_group(
        &mut self,
        model: &OnDevice,
        group: &[GroupEntry],
        ids: &[u32],
        logits: Logits,
        done: &mut Vec<SequenceResult>,
    ) -> Result<Tensor> {
        let tokens = group[0].rows.len();
        let batch = Batch::new(&group.iter().map(|part| (part.seq, tokens)).collect::<Vec<_>>())?;
        let ids: Vec<u32> =
            group.iter().flat_map(|part| &ids[part.rows.clone()]).copied().collect();
        if tokens == 1
            && let Some(output) = self.replay(model, &batch, &ids, logits)?
        {
            self.finish_step(group, done)?;
            return Ok(output);
        }
        let seen = self.seen(group[0].seq);
        let snapshot_positions =
            if tokens > 1 { self.snapshot_positions(group[0].seq, tokens) } else { Vec::new() };
        let ids = Tensor::new(ids, self.model.device())?;
        let mut call = Call {
            batch: &batch,
            ids: &ids,
            logits,
            first: seen == 0,
            states: self.states.on_device()?.contiguous(batch.seqs())?,
            caches: &mut self.caches,
            snapshots: snapshot_positions.iter().map(|at| (at - seen, Vec::new())).collect(),
        };
        let output = model.forward(&mut call)?;
        if tokens == 1 {
            self.finish_step(group, done)?;
            return Ok(output);
        }
        let copies = call.snapshots.into_iter();
        let mut copies: Vec<_> =
            copies.map(|(at, copy)| (seen + at, RecurrentState::OnDevice(copy))).collect();
        for &GroupEntry { seq, .. } in group {
            done.push(SequenceResult { seq, tokens, snapshots: std::mem::take(&mut copies) });
        }
        Ok(output)
    }

    /// Runs a decode step of known sequences in a CUDA graph, if the session has graphs.
    fn replay(
        &mut self,
        model: &OnDevice,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
    ) -> Result<Option<Tensor>> {
        let known = |seq: &SeqId| self.sequences.get(seq).is_some_and(|of| of.seen > 0);
        let known = batch.seqs().iter().all(known);
        let Some(graphs) = self.graphs.as_mut().filter(|_| known && model.is_half()) else {
            return Ok(None);
        };
        let states = self.states.on_device()?.contiguous(batch.seqs())?;
        let addresses = states.iter().map(address).collect::<Result<Vec<_>>>()?;
        let mut forward = |caches: &mut [Box<dyn KvCache>], batch: &Batch, ids: &Tensor| {
            let (first, snapshots) = (false, Vec::new());
            model.forward(&mut Call {
                batch,
                ids,
                logits,
                first,
                states: &mut *states,
                caches,
                snapshots,
            })
        };
        graphs.step(batch, ids, &mut self.caches, &addresses, &mut forward, Some)
    }

    /// Records a decoded token of each sequence. A snapshot is a copy of the resulting state.
    fn finish_step(&self, group: &[GroupEntry], done: &mut Vec<SequenceResult>) -> Result<()> {
        for &GroupEntry { seq, .. } in group {
            let snapshots = match self.snapshot_positions(seq, 1)[..] {
                [at] => vec![(at, self.states.copy(seq)?)],
                _ => Vec::new(),
            };
            done.push(SequenceResult { seq, tokens: 1, snapshots });
        }
        Ok(())
    }
}

/// Reorders the rows of all groups to the batch's order: row i is row `order[i]` of the batch.
fn in_order(outputs: Vec<Tensor>, order: &[usize]) -> Result<Tensor> {
    let [first, rest @ ..] = outputs.as_slice() else {
        return Err(Error::mismatch("groups of a batch", "at least one", 0));
    };
    if rest.is_empty() {
        return Ok(first.clone());
    }
    let mut rows = vec![0u32; order.len()];
    (0..).zip(order).for_each(|(i, &row)| rows[row] = i);
    let rows = Tensor::new(rows, first.device())?;
    Ok(Tensor::cat(&outputs, 0)?.index_select(&rows, 0)?)
}

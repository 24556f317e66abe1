//! Processes one chunk of queries.

use std::ops::Range;

use super::received::Received;
use super::state::SeqState;
use super::unrotated_rows::UnrotatedRows;
use super::{InfLlm, missing_state};
use crate::storage::lse_with_sink_logits;
use crate::sub_batch::{SubBatch, assemble, select_rows};
use candle_core::{DType, Tensor};
use longctx_core::{
    AttentionState, Batch, EntryRanges, Error, KvCache, KvStore, Mask, Result, Selection, SeqId,
    attention,
};

/// Decoded tokens beyond the window that the window's store may hold before they are dropped.
const EVICTION_STEP: usize = 256;

/// A chunk's rotated rows, and the tokens that each of its sequences sees.
pub(super) struct Chunk<'a> {
    pub rows: &'a UnrotatedRows,
    pub q: Tensor,
    pub k: Tensor,
    /// Queries rotated to the clipped distance of the past.
    pub q_far: Tensor,
    pub seqs: Vec<ChunkSeq>,
}

/// One sequence of a chunk.
pub(super) struct ChunkSeq {
    pub seq: SeqId,
    /// Index of the chunk's first token.
    pub start: usize,
    pub count: usize,
    /// Tokens that leave the window within the chunk: one with each of the last queries.
    pub leaving: Range<usize>,
    /// Token of the window store's first entry.
    pub window_start: usize,
    /// Blocks that the chunk retrieves, best first.
    pub selected: Vec<usize>,
}

/// Late queries and the leaving tokens that they still see, both in reverse order. The first of
/// these queries sees all of the tokens, each next one fewer: in reverse order that is a causal
/// mask.
pub(super) struct Reversed {
    pub part: SubBatch,
    /// The reversed index of each row. The permutation is its own inverse.
    pub order: Tensor,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl<S: KvStore, W: KvStore> InfLlm<S, W> {
    /// Processes tokens chunk by chunk. Returns their attention, unless the engine computed it.
    pub(super) fn process_chunks(
        &mut self,
        rows: &UnrotatedRows,
    ) -> Result<Option<AttentionState>> {
        for (seq, own) in rows.batch.iter() {
            let sizes = self.sizes.of(self.sequences.prompt_with(seq, own.len()))?;
            let spec = &self.spec;
            let sequence = self.sequences.begin(seq, || SeqState::new(sizes, spec));
            sequence.state.resize(sizes, sequence.seen);
        }
        self.past.append(&rows.batch, &rows.k, &rows.v)?;
        let mut processed = Vec::new();
        for round in 0.. {
            let chunk = |seq, tokens: usize| {
                let size = self.state(seq).map_or(tokens, |state| state.sizes.chunk);
                (round * size).min(tokens)..((round + 1) * size).min(tokens)
            };
            let Some(part) = SubBatch::new(&rows.batch, chunk)? else { break };
            let state = self.process_chunk(&rows.sub_batch(&part)?, &rows.batch)?;
            processed.extend(state.map(|state| (part, state)));
        }
        if rows.exact_lse.is_some() {
            return Ok(None);
        }
        let done: Vec<_> = processed.iter().map(|(part, state)| (part, state.clone())).collect();
        assemble(&done, rows.batch.tokens()).map(Some)
    }

    fn process_chunk(
        &mut self,
        rows: &UnrotatedRows,
        call: &Batch,
    ) -> Result<Option<AttentionState>> {
        let chunk = self.chunk(rows)?;
        let reversed = self.reversed(&chunk)?;
        let (state, lse) = match &rows.exact_lse {
            Some(lse) => (None, lse.clone()),
            None => {
                let mut parts = self.attend_window(&chunk, reversed.as_ref())?;
                parts.extend(self.attend_past(&chunk)?);
                let state = AttentionState::merge(&parts)?;
                let lse = lse_with_sink_logits(&state, &self.spec)?;
                (Some(state), lse)
            }
        };
        let received = self.received(&chunk, reversed.as_ref(), &lse)?;
        self.window.append(&rows.batch, &chunk.k, &rows.v)?;
        let done = self.commit(&chunk, received, call);
        done.map_err(|error| self.sequences.poison(call.seqs(), error))?;
        Ok(state)
    }

    fn chunk<'a>(&self, rows: &'a UnrotatedRows) -> Result<Chunk<'a>> {
        let positions = rows.batch.positions(|seq| self.seen(seq));
        let mut far = Vec::new();
        for (seq, own) in rows.batch.iter() {
            let local = self.state(seq).ok_or_else(missing_state)?.sizes.local;
            far.resize(own.end, local as i64 - 1);
        }
        let q_far = self.spec.rotate(&rows.q, &far)?;
        let means = mean_queries(&rows.batch, &q_far)?;
        let of_seq = |((seq, own), mean): ((SeqId, Range<usize>), &Vec<f32>)| {
            let (state, start) = (self.state(seq).ok_or_else(missing_state)?, self.seen(seq));
            Ok(ChunkSeq {
                seq,
                start,
                count: own.len(),
                leaving: state.leaving(start + own.len()),
                window_start: start - self.window.len(seq),
                selected: state.blocks.select(mean, state.sizes.top_blocks),
            })
        };
        let seqs = rows.batch.iter().zip(&means).map(of_seq).collect::<Result<_>>()?;
        let (q, k) =
            (self.spec.rotate(&rows.q, &positions)?, self.spec.rotate(&rows.k, &positions)?);
        Ok(Chunk { rows, q, k, q_far, seqs })
    }

    /// Attention over the chunk's own tokens and the window before them, at true distances.
    fn attend_window(
        &self,
        chunk: &Chunk<'_>,
        reversed: Option<&Reversed>,
    ) -> Result<Vec<AttentionState>> {
        let (batch, shape) = (&chunk.rows.batch, &self.spec.shape);
        let mut states = vec![attention::attend(batch, &chunk.q, &chunk.k, &chunk.rows.v, shape)?];
        for (part, ranges) in self.window_parts(chunk)? {
            let q = part.rows(&chunk.q)?;
            let state = self.window.attend(&part.batch, &q, Mask::Entries(&ranges))?;
            states.push(part.scatter(state, batch.tokens())?);
        }
        if let Some(Reversed { part, order, q, k, v }) = reversed {
            let AttentionState { out, lse } = attention::attend(&part.batch, q, k, v, shape)?;
            let (out, lse) = (select_rows(&out, order)?, select_rows(&lse, order)?);
            states.push(part.scatter(AttentionState { out, lse }, batch.tokens())?);
        }
        Ok(states)
    }

    /// Returns which queries read which entries of the window's store. All queries read the tokens
    /// that stay in the window. Queries before the first token leaves also read the leaving tokens.
    pub(super) fn window_parts(&self, chunk: &Chunk<'_>) -> Result<Vec<(SubBatch, EntryRanges)>> {
        let batch = &chunk.rows.batch;
        let early = |seq| {
            let s = chunk.seq(seq);
            if s.leaving.is_empty() { 0..0 } else { 0..s.count - s.leaving.len() }
        };
        let all = SubBatch::of_sequences(batch, |_, _| true)?;
        let early = SubBatch::new(batch, |seq, _| early(seq))?;
        let mut parts = Vec::new();
        if let Some(part) = all {
            let ranges = self.window_ranges(chunk, &part, |s| s.leaving.end..s.start)?;
            parts.push((part, ranges));
        }
        if let Some(part) = early {
            let ranges = self.window_ranges(chunk, &part, |s| s.leaving.clone())?;
            parts.push((part, ranges));
        }
        let reads =
            |(_, ranges): &(SubBatch, EntryRanges)| ranges.heads().iter().any(|r| !r.is_empty());
        parts.retain(reads);
        Ok(parts)
    }

    /// Converts token ranges to entries of the window's store, for each sequence of a part and kv
    /// head.
    fn window_ranges(
        &self,
        chunk: &Chunk<'_>,
        part: &SubBatch,
        tokens: impl Fn(&ChunkSeq) -> Range<usize>,
    ) -> Result<EntryRanges> {
        let of_seq = |&seq: &SeqId| {
            let s = chunk.seq(seq);
            let Range { start, end } = tokens(s);
            let range = start - s.window_start..end - s.window_start;
            if range.is_empty() { Vec::new() } else { vec![range] }
        };
        self.for_each_head(part.batch.seqs().iter().map(of_seq))
    }

    fn for_each_head(&self, seqs: impl Iterator<Item = Vec<Range<usize>>>) -> Result<EntryRanges> {
        let kv_heads = self.spec.shape.kv_heads;
        EntryRanges::new(seqs.flat_map(|ranges| vec![ranges; kv_heads]).collect())
    }

    /// The late queries except the last, and the leaving tokens except the first: query i sees
    /// token i and those after it.
    fn reversed(&self, chunk: &Chunk<'_>) -> Result<Option<Reversed>> {
        let late = |seq| {
            let s = chunk.seq(seq);
            if s.leaving.len() < 2 { 0..0 } else { s.count - s.leaving.len()..s.count - 1 }
        };
        let Some(part) = SubBatch::new(&chunk.rows.batch, |seq, _| late(seq))? else {
            return Ok(None);
        };
        let order: Vec<u32> =
            part.batch.iter().flat_map(|(_, own)| own.rev().map(|row| row as u32)).collect();
        let order = Tensor::new(order, chunk.q.device())?;
        let tokens =
            |s: &ChunkSeq| s.leaving.start + 1 - s.window_start..s.leaving.end - s.window_start;
        let (k, v) = self.read_leaving(chunk, &part, &self.window, tokens)?;
        let reverse = |x: &Tensor| select_rows(x, &order);
        let (q, k, v) = (reverse(&part.rows(&chunk.q)?)?, reverse(&k)?, reverse(&v)?);
        Ok(Some(Reversed { part, order, q, k, v }))
    }

    /// Reads keys and values of ranges of a store's entries, concatenated over the sequences of a
    /// part: `[tokens, kv_heads, channels]` in the dtype of the queries, for which a device has
    /// kernels.
    fn read_leaving(
        &self,
        chunk: &Chunk<'_>,
        part: &SubBatch,
        store: &impl KvStore,
        entries: impl Fn(&ChunkSeq) -> Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for &seq in part.batch.seqs() {
            let range = entries(chunk.seq(seq));
            let (mut k, mut v) = (Vec::new(), Vec::new());
            for head in 0..self.spec.shape.kv_heads {
                let (head_k, head_v) = store.read_range(seq, head, range.clone())?;
                k.push(head_k.unsqueeze(1)?);
                v.push(head_v.unsqueeze(1)?);
            }
            keys.push(Tensor::cat(&k, 1)?);
            values.push(Tensor::cat(&v, 1)?);
        }
        let all = |of_seqs: &[Tensor]| -> Result<Tensor> {
            let all = Tensor::cat(of_seqs, 0)?.to_device(chunk.q.device())?;
            Ok(all.to_dtype(chunk.q.dtype())?)
        };
        Ok((all(&keys)?, all(&values)?))
    }

    /// Attention over everything outside the window, all of it at the same distance.
    fn attend_past(&self, chunk: &Chunk<'_>) -> Result<Vec<AttentionState>> {
        let (batch, shape) = (&chunk.rows.batch, &self.spec.shape);
        // Tokens that leave the window within the chunk are not yet past for its early queries.
        let staggered = |s: &ChunkSeq| s.count > 1 && !self.published_remainder;
        let visible = |s: &ChunkSeq| {
            let end = if staggered(s) { s.leaving.start } else { s.leaving.end };
            self.state(s.seq).map_or(Vec::new(), |state| state.visible(&s.selected, end))
        };
        let ranges = self.for_each_head(chunk.seqs.iter().map(visible))?;
        let mut states = Vec::new();
        if ranges.heads().iter().any(|ranges| !ranges.is_empty()) {
            states.push(self.past.attend(batch, &chunk.q_far, Mask::Entries(&ranges))?);
        }
        let late = |seq| {
            let s = chunk.seq(seq);
            if staggered(s) { s.count - s.leaving.len()..s.count } else { 0..0 }
        };
        if let Some(part) = SubBatch::new(batch, |seq, _| late(seq))? {
            let (k, v) = self.read_leaving(chunk, &part, &self.past, |s| s.leaving.clone())?;
            let q = part.rows(&chunk.q_far)?;
            let state = attention::attend(&part.batch, &q, &k, &v, shape)?;
            states.push(part.scatter(state, batch.tokens())?);
        }
        Ok(states)
    }

    /// Moves tokens from the window to the past, and shortens the window's store.
    fn commit(&mut self, chunk: &Chunk<'_>, received: Vec<Received>, call: &Batch) -> Result<()> {
        for s in &chunk.seqs {
            let state = self.state_mut(s.seq)?;
            state.blocks.make_resident(&s.selected, state.sizes.resident_blocks);
            state.append(s.count);
        }
        for (seq, first, sums) in received {
            self.state_mut(seq)?.add_attention(first, &sums);
        }
        for s in &chunk.seqs {
            let blocks = self.state_mut(s.seq)?.leave_window(s.leaving.end);
            for keys in self.keys_of_blocks(s.seq, &blocks)? {
                self.state_mut(s.seq)?.add_block(&keys);
            }
            let tokens = call.iter().find(|(seq, _)| *seq == s.seq).map_or(0, |(_, own)| own.len());
            self.sequences.advance_part(s.seq, s.count, tokens);
        }
        let in_window: Vec<_> = chunk.seqs.iter().filter_map(|s| self.newest(s)).collect();
        if in_window.is_empty() {
            return Ok(());
        }
        // Without room for copies of shared blocks the entries stay until a later call.
        self.window.retain_each(&in_window).map(drop)
    }

    /// Returns the unrotated keys of blocks, a list per kv head for each. Copies once from the
    /// device.
    fn keys_of_blocks(&self, seq: SeqId, blocks: &[Range<usize>]) -> Result<Vec<Vec<Vec<f32>>>> {
        let kv_heads = self.spec.shape.kv_heads;
        let mut keys = Vec::new();
        for block in blocks {
            for head in 0..kv_heads {
                keys.push(self.past.read_range(seq, head, block.clone())?.0.flatten_all()?);
            }
        }
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let keys = Tensor::stack(&keys, 0)?.to_vec2()?;
        Ok(keys.chunks(kv_heads).map(<[_]>::to_vec).collect())
    }

    /// Returns the entries within the window once more than `EVICTION_STEP` are outside it.
    fn newest(&self, s: &ChunkSeq) -> Option<(SeqId, Selection)> {
        let len = self.window.len(s.seq);
        let inside = s.start + s.count - s.leaving.end;
        let overhang = if s.count > 1 { 0 } else { EVICTION_STEP };
        let newest = (len > inside + overhang).then(|| (len - inside) as u32..len as u32)?;
        Some((s.seq, Selection::uniform(self.spec.shape.kv_heads, newest.collect())))
    }

    fn state_mut(&mut self, seq: SeqId) -> Result<&mut SeqState> {
        let sequence = self.sequences.get_mut(seq);
        sequence.map(|sequence| &mut sequence.state).ok_or(Error::UnknownSequence(seq))
    }
}

/// Returns each sequence's mean query, `[heads * head_dim]`. Blocks are selected on the host.
fn mean_queries(batch: &Batch, q: &Tensor) -> Result<Vec<Vec<f32>>> {
    let q = q.to_dtype(DType::F32)?.flatten_from(1)?;
    let mean = |(_, own): (SeqId, Range<usize>)| q.narrow(0, own.start, own.len())?.mean_keepdim(0);
    let means = batch.iter().map(mean).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&means, 0)?.to_vec2()?)
}

impl Chunk<'_> {
    pub fn seq(&self, seq: SeqId) -> &ChunkSeq {
        let found = self.seqs.iter().find(|s| s.seq == seq);
        found.unwrap_or_else(|| unreachable!("a chunk knows its sequences"))
    }
}

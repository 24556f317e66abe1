//! A decoded token's attention, and the eviction of one entry of each kv head by it: two launches.

use super::decode::{Outputs, Scores};
use super::prepared::Prepared;
use super::{BlockTable, CudaPool};
use crate::cuda::{address, empty, evict_after_step};
use crate::{Batch, Error, EvictOne, KeptEntries, Mask, Result, RowReduction, SeqId, StepLists};
use candle_core::{DType, Device, Tensor};
use longctx_cuda::{bytes_of, upload};
use longctx_kernels::paged::{self, EvictRow};

/// The lists of an eviction, and the scores that it reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct EvictLists {
    /// Array of [`EvictRow`], one for each kv head.
    pub rows: u64,
    /// The log-sum-exps.
    pub lse: u64,
    pub scores: Scores,
}

impl EvictLists {
    /// Returns the outputs of attention that the eviction reads.
    fn outputs<'a>(&self, out: &'a Tensor) -> Outputs<'a> {
        Outputs { out, lse: self.lse, scores: Some(self.scores) }
    }
}

impl CudaPool {
    /// Returns whether each sequence can evict one entry of each head: heads have equally many
    /// entries, and no block is shared. With a sliding window, attention leaves out the scores of
    /// entries beyond it.
    pub fn evicts_one(&self, seqs: &[SeqId]) -> bool {
        let any_shared = self.blocks.any_shared();
        let of_seq = |seq: &SeqId| {
            let Some(sequence) = self.seqs.get(seq) else { return false };
            let len = sequence.heads[0].len;
            let shared = |&block: &u32| self.blocks.shared(block);
            let own = |table: &BlockTable| !any_shared || !table.blocks.iter().any(shared);
            sequence.heads.iter().all(|table| table.len == len && own(table))
        };
        self.decodes(1) && self.shape.window.is_none() && seqs.iter().all(of_seq)
    }

    /// Computes causal attention of one query per sequence, and evicts one entry of each head.
    /// Launches of a prepared batch follow its lists, and return no entries. It evicts at the end of
    /// the step.
    pub fn attend_and_evict(
        &mut self,
        batch: &Batch,
        q: &Tensor,
        dtype: DType,
        evictions: &[EvictOne],
    ) -> Result<(Tensor, Vec<KeptEntries>)> {
        self.check_queries(batch, q, Mask::Causal)?;
        let (q, main) = (self.fit(q)?, self.stream());
        // SAFETY: attention writes every output.
        let out = unsafe { empty(q.shape(), dtype, q.device()) }?;
        if let Some(prepared) = self.prepared_for(batch)? {
            let missing = || Error::Unsupported("an eviction in a step prepared without".into());
            let lists = prepared.evict.ok_or_else(missing)?;
            self.launch_decode(batch, &q, Mask::Causal, lists.outputs(&out))?;
            let args = self.evict_args(lists, prepared.tables, prepared.heads);
            // SAFETY: as below. The lists and the scores are those of this layer and step.
            unsafe { evict_after_step(batch, &main, args) }?;
            return Ok((out, Vec::new()));
        }
        let (rows, kept) = self.evict_rows(batch, evictions)?;
        let (dims, row) = ((batch.tokens(), self.shape.heads), self.scores_row(batch));
        // SAFETY: attention writes every element that is read.
        let empty =
            |columns| unsafe { Tensor::empty((dims.0, dims.1, columns), DType::F32, q.device()) };
        let (lse, scores) = (empty(1)?, empty(row)?);
        let (on_device, tables) = (upload(&main, &rows)?, self.tables(batch)?);
        let scores = Scores { address: address(&scores)?, row };
        let lists = EvictLists { rows: on_device.address(), lse: address(&lse)?, scores };
        self.launch_decode(batch, &q, Mask::Causal, lists.outputs(&out))?;
        // SAFETY: the arrays have these sizes, the tables name blocks that only their sequence has,
        // and the stream frees no memory before the launch has used it.
        unsafe { paged::evict(&main, &[self.evict_args(lists, tables.address(), rows.len())]) }?;
        self.drop_one(batch);
        Ok((out, kept))
    }

    /// Adds the lists of an eviction to the step that was prepared last, and counts the entries.
    pub fn prepare_evict(
        &mut self,
        batch: &Batch,
        evictions: &[EvictOne],
        lists: &mut StepLists,
    ) -> Result<Vec<KeptEntries>> {
        let missing = || Error::Unsupported("an eviction without a prepared step".into());
        let prepared = self.prepared.ok_or_else(missing)?;
        if self.prepared_seqs != batch.seqs() {
            let expected = format!("{:?}, as in the prepared step", self.prepared_seqs);
            let got = format!("{:?}", batch.seqs());
            return Err(Error::mismatch("sequences of a prepared eviction", expected, got));
        }
        let (rows, kept) = self.evict_rows(batch, evictions)?;
        let (heads, row) = (batch.tokens() * self.shape.heads, self.scores_row(batch));
        lists.push_size(row);
        let evict = EvictLists {
            rows: lists.push(bytes_of(&rows), size_of_val(&rows[..])),
            lse: lists.reserve(4 * heads),
            scores: Scores { address: lists.reserve(4 * heads * row), row },
        };
        self.prepared = Some(Prepared { evict: Some(evict), ..prepared });
        self.drop_one(batch);
        Ok(kept)
    }

    /// Returns the row stride of the scores.
    fn scores_row(&self, batch: &Batch) -> usize {
        let of_seq = |seq| self.seqs.get(seq).map_or(0, |sequence| sequence.heads[0].len);
        batch.seqs().iter().map(of_seq).max().unwrap_or(0).next_multiple_of(64)
    }

    /// Checks the evictions. Returns the kernel's rows, `[sequences * kv_heads]`, and the outputs.
    fn evict_rows(
        &self,
        batch: &Batch,
        evictions: &[EvictOne],
    ) -> Result<(Vec<EvictRow>, Vec<KeptEntries>)> {
        if evictions.len() != batch.seqs().len() || batch.max_seqlen() > 1 {
            let expected = format!("one for the token of each of {} sequences", batch.seqs().len());
            return Err(Error::mismatch("evictions", expected, evictions.len()));
        }
        if !self.evicts_one(batch.seqs()) {
            let what = "one eviction per head of these sequences: it needs heads with equally many \
                        entries, blocks that no fork shares, and no sliding window";
            return Err(Error::Unsupported(what.into()));
        }
        let (mut rows, mut all_kept) = (Vec::new(), Vec::new());
        for ((seq, tokens), of) in batch.iter().zip(evictions) {
            let len = self.known(seq)?.heads[0].len;
            if len == 0 {
                let what = format!("entries of sequence {seq} to evict one from");
                return Err(Error::mismatch(what, "at least 1", 0));
            }
            let kept = self.kept_entries(of, len - 1)?;
            let first = self.evict_row(of, &kept, len)?;
            for kv_head in 0..self.shape.kv_heads {
                let at = |start: u64, columns: i32| match start {
                    0 => 0,
                    start => start + 4 * kv_head as u64 * columns as u64,
                };
                rows.push(EvictRow {
                    previous: at(first.previous, first.scored),
                    positions: at(first.positions, first.placed),
                    kept_scores: at(first.kept_scores, first.len - 1),
                    kept_positions: at(first.kept_positions, first.len - 1),
                    table: rows.len() as i32,
                    kv_head: kv_head as i32,
                    token: tokens.start as i32,
                    ..first
                });
            }
            all_kept.push(kept);
        }
        Ok((rows, all_kept))
    }

    fn kept_entries(&self, of: &EvictOne, count: usize) -> Result<KeptEntries> {
        let dims = (self.shape.kv_heads, count);
        let device = Device::Cuda(self.device.clone());
        let is = |x: &Tensor, dtype: DType| {
            let here = x.is_contiguous() && x.device().same_device(&device);
            x.dims() == [dims.0, dims.1] && x.dtype() == dtype && here
        };
        let fits = |kept: &&KeptEntries| {
            let scores = kept.scores.as_ref();
            is(&kept.positions, DType::U32)
                && scores.map_or(!of.carries_scores, |scores| is(scores, DType::F32))
        };
        if let Some(kept) = of.outputs.as_ref().filter(fits) {
            return Ok(kept.clone());
        }
        // SAFETY: the kernel writes every element.
        let empty = |dtype| unsafe { Tensor::empty(dims, dtype, &device) };
        let scores = of.carries_scores.then(|| empty(DType::F32)).transpose()?;
        Ok(KeptEntries { positions: empty(DType::U32)?, scores })
    }

    /// Returns the row of the first kv head.
    fn evict_row(&self, of: &EvictOne, kept: &KeptEntries, len: usize) -> Result<EvictRow> {
        let (kv_heads, ranking) = (self.shape.kv_heads, &of.ranking);
        let sinks = ranking.sinks.min(len - 1);
        // Returns the address and the columns of an input.
        let input = |x: &Option<Tensor>, dtype: DType, what: &str| {
            let Some(x) = x.as_ref().filter(|x| x.elem_count() > 0) else { return Ok((0, 0)) };
            let columns =
                x.dims2().ok().filter(|&(heads, columns)| heads == kv_heads && columns <= len);
            match columns {
                Some((_, columns)) if x.dtype() == dtype && x.is_contiguous() => {
                    self.check_device(x)?;
                    Ok((address(x)?, columns as i32))
                }
                _ => {
                    let expected = format!("[{kv_heads}, at most {len}], {dtype:?}, contiguous");
                    Err(Error::mismatch(what, expected, format!("{:?} {:?}", x.dims(), x.dtype())))
                }
            }
        };
        let (previous, scored) = input(&ranking.previous, DType::F32, "previous scores")?;
        let (positions, placed) = input(&ranking.positions, DType::U32, "positions")?;
        Ok(EvictRow {
            previous,
            positions,
            kept_scores: kept.scores.as_ref().filter(|_| len > 1).map_or(Ok(0), address)?,
            kept_positions: if len > 1 { address(&kept.positions)? } else { 0 },
            len: len as i32,
            scored,
            placed,
            next: ranking.next_position,
            sinks: sinks as i32,
            recent: ranking.recent.min(len - 1 - sinks) as i32,
            layer: of.of_layer.into(),
            maximum: (ranking.reduction == RowReduction::Max).into(),
            ..EvictRow::default()
        })
    }

    /// Returns the arguments of an eviction from `heads` kv heads.
    fn evict_args(&self, lists: EvictLists, tables: u64, heads: usize) -> paged::EvictArgs {
        paged::EvictArgs {
            scores: lists.scores.address,
            lse: lists.lse,
            rows: lists.rows,
            tables,
            heads: self.shape.heads as i32,
            heads_per_kv: self.shape.heads_per_kv() as i32,
            scores_row: lists.scores.row as i32,
            pieces: (self.shape.head_dim / 8) as i32,
            count: heads as i32,
            unused: 0,
        }
    }

    /// Counts the eviction of one entry of each head.
    fn drop_one(&mut self, batch: &Batch) {
        for &seq in batch.seqs() {
            let lens: Vec<_> = self.lens(seq).iter().map(|len| len.saturating_sub(1)).collect();
            self.truncate(seq, &lens);
        }
    }
}

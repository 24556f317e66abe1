//! Attention over blocks: sequences with many queries through the prefill kernels, those with a few
//! as in [`decode`](super::decode).

use super::CudaPool;
use super::decode::Outputs;
use crate::cuda::{address, empty};
use crate::{AttentionState, Batch, EntryRanges, Error, Mask, Result};
use candle_core::{DType, Device, Tensor};
use longctx_kernels::{PAGE, PrefillArgs, prefill};

/// The largest number of query heads per kv head times queries for the decode kernel. It reads the
/// keys once for every few columns; beyond this number, tiles that share the keys are faster.
const MAX_COLUMNS: usize = 16;

/// Keys and values of each sequence and kv head, as the prefill kernels read them.
struct Pages {
    /// Address of block 0.
    first: u64,
    /// Number of blocks from that address on.
    extent: usize,
    /// Block numbers of each head, `[sequences * kv_heads]` lists.
    tables: Vec<Vec<u32>>,
    lens: Vec<u32>,
}

impl CudaPool {
    /// Sequences with many queries use the prefill kernels, others the decode kernel: a chunk of a
    /// prompt does not slow the decoding sequences of its batch down.
    pub fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        self.check_queries(batch, q, mask)?;
        let q = self.fit(q)?;
        let long = batch.iter().filter(|(_, tokens)| !self.decodes(tokens.len())).count();
        if long == 0 {
            return self.decode(batch, &q, mask);
        }
        let state = match mask {
            Mask::Entries(ranges) => self.prefill_entries(batch, &q, ranges, mask)?,
            _ => self.prefill(batch, &q, &self.pages(batch), mask)?,
        };
        if long < batch.seqs().len() {
            let (out, lse) = (&state.out, address(&state.lse)?);
            self.launch_decode(batch, &q, mask, Outputs { out, lse, scores: None })?;
        }
        Ok(state)
    }

    /// Returns whether a sequence with `queries` queries uses the decode kernel.
    pub(super) fn decodes(&self, queries: usize) -> bool {
        self.shape.heads_per_kv() * queries <= MAX_COLUMNS
    }

    /// Copies selected entries of the sequences with many queries to contiguous blocks for the
    /// prefill kernels.
    fn prefill_entries(
        &self,
        batch: &Batch,
        q: &Tensor,
        ranges: &EntryRanges,
        mask: Mask<'_>,
    ) -> Result<AttentionState> {
        let mut lists = self.lists(batch, ranges);
        let of_seqs = lists.chunks_mut(self.shape.kv_heads).zip(batch.iter());
        let short = of_seqs.filter(|(_, (_, tokens))| self.decodes(tokens.len()));
        short.flat_map(|(lists, _)| lists).for_each(|(_, _, list)| list.clear());
        let blocks = self.gather(&lists)?;
        let mut next = 0;
        let table = |len: usize| {
            let first = next;
            next += len.div_ceil(PAGE) as u32;
            (first..next).collect()
        };
        let lens: Vec<_> = lists.iter().map(|(_, _, list)| list.len()).collect();
        let tables = lens.iter().copied().map(table).collect();
        let lens = lens.into_iter().map(|len| len as u32).collect();
        let pages = Pages { first: address(&blocks)?, extent: blocks.dim(0)?, tables, lens };
        self.prefill(batch, q, &pages, mask)
    }

    /// Returns the output in `dtype`, without log-sum-exps.
    pub fn attend_output(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        dtype: DType,
    ) -> Result<Tensor> {
        let known = matches!(dtype, DType::F16 | DType::BF16 | DType::F32);
        if !known || !self.decodes(batch.max_seqlen()) {
            return Ok(self.attend(batch, q, mask)?.out.to_dtype(dtype)?);
        }
        self.check_queries(batch, q, mask)?;
        let q = self.fit(q)?;
        // SAFETY: the kernel writes every element.
        let out = unsafe { empty(q.shape(), dtype, q.device()) }?;
        self.launch_decode(batch, &q, mask, Outputs { out: &out, lse: 0, scores: None })?;
        Ok(out)
    }

    pub(super) fn check_queries(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<()> {
        let tokens = self.shape.check_q(q)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of q", batch.tokens(), tokens));
        }
        match mask {
            Mask::Full => Ok(()),
            Mask::Entries(ranges) => {
                let none = vec![0; self.shape.kv_heads];
                let lens = batch.seqs().iter().flat_map(|&seq| match self.contains(seq) {
                    true => self.lens(seq),
                    false => none.clone(),
                });
                ranges.check(&lens.collect::<Vec<_>>())
            }
            Mask::Causal => batch.iter().try_for_each(|(seq, tokens)| {
                let heads = self.seqs.get(&seq).into_iter().flat_map(|of| &of.heads);
                let shortest = heads.map(|table| table.len).min().unwrap_or(0);
                if shortest < tokens.len() {
                    let what = format!("entries of sequence {seq}");
                    let expected = format!("at least its {} own", tokens.len());
                    return Err(Error::mismatch(what, expected, shortest));
                }
                Ok(())
            }),
        }
    }

    /// Returns the entries within the ranges, for each sequence and kv head.
    pub(super) fn lists(
        &self,
        batch: &Batch,
        ranges: &EntryRanges,
    ) -> Vec<(crate::SeqId, usize, Vec<u32>)> {
        let kv_heads = self.shape.kv_heads;
        let list = |(i, ranges): (usize, &Vec<std::ops::Range<usize>>)| {
            let entries = ranges.iter().cloned().flatten().map(|entry| entry as u32);
            (batch.seqs()[i / kv_heads], i % kv_heads, entries.collect())
        };
        ranges.heads().iter().enumerate().map(list).collect()
    }

    /// Returns the pool's blocks in place, without a copy. Sequences with few queries have none.
    fn pages(&self, batch: &Batch) -> Pages {
        let (first, extent) = self.blocks.extent();
        let size = self.blocks.size() as u64;
        let number = |&block: &u32| ((self.blocks.address(block) - first) / size) as u32;
        let (mut tables, mut lens) = (Vec::new(), Vec::new());
        for (seq, tokens) in batch.iter() {
            let sequence = self.seqs.get(&seq).filter(|_| !self.decodes(tokens.len()));
            for head in 0..self.shape.kv_heads {
                let table = sequence.map(|sequence| &sequence.heads[head]);
                let blocks = table.map_or(&[][..], |table| &table.blocks);
                tables.push(blocks.iter().map(number).collect());
                lens.push(table.map_or(0, |table| table.len as u32));
            }
        }
        Pages { first, extent, tables, lens }
    }

    fn prefill(
        &self,
        batch: &Batch,
        q: &Tensor,
        pages: &Pages,
        mask: Mask<'_>,
    ) -> Result<AttentionState> {
        let (shape, d, kv_heads) = (&self.shape, self.shape.head_dim, self.shape.kv_heads);
        let device = q.device();
        if pages.lens.iter().all(|len| *len == 0) {
            let dims = (batch.tokens(), shape.heads);
            let out = Tensor::zeros((dims.0, dims.1, d), DType::F32, device)?;
            return Ok(AttentionState { out, lse: Tensor::full(f32::NEG_INFINITY, dims, device)? });
        }
        let most = pages.tables.iter().map(Vec::len).max().unwrap_or(0);
        let padded = |table: &Vec<u32>| {
            let rest = most - table.len();
            table.iter().copied().chain(std::iter::repeat_n(0, rest)).collect::<Vec<_>>()
        };
        let tables: Vec<u32> = pages.tables.iter().flat_map(padded).collect();
        let tables = Tensor::new(tables, device)?;
        let lens = Tensor::new(pages.lens.as_slice(), device)?;
        let (out, lse) = self.outputs(batch)?;
        let causal = mask == Mask::Causal;
        let block = (2 * PAGE * d) as i64;
        let args = PrefillArgs {
            q: address(q)?,
            k: pages.first,
            v: pages.first + (2 * PAGE * d) as u64,
            out: address(&out)?,
            lse: address(&lse)?,
            cu_seqlens_q: address(&batch.cu_seqlens_on(device)?)?,
            seqlens_k: address(&lens)?,
            block_table: address(&tables)?,
            q_token: (shape.heads * d) as i64,
            q_head: d as i64,
            k_token: d as i64,
            k_head: block,
            v_token: d as i64,
            v_head: block,
            table_seq: (kv_heads * most) as i64,
            table_head: most as i64,
            lens_seq: kv_heads as i64,
            lens_head: 1,
            seqs: batch.seqs().len() as i32,
            tokens: batch.tokens() as i32,
            kv_extent: pages.extent as i32,
            heads: shape.heads as i32,
            kv_heads: kv_heads as i32,
            causal: causal.into(),
            window: shape.window.filter(|_| causal).map_or(0, |window| window.min(1 << 30) as i32),
            scale: shape.scale,
            soft_cap: shape.soft_cap.unwrap_or(0.0),
            out_f32: 1,
            ..PrefillArgs::default()
        };
        // SAFETY: the tables name blocks that hold the entries, all arrays have the sizes that the
        // kernels expect, and the stream frees no memory before they have used it.
        unsafe { prefill(&self.stream(), self.half(), d, &args) }?;
        Ok(AttentionState { out, lse })
    }

    /// Allocates outputs and log-sum-exps.
    pub(super) fn outputs(&self, batch: &Batch) -> Result<(Tensor, Tensor)> {
        let (tokens, heads, d) = (batch.tokens(), self.shape.heads, self.shape.head_dim);
        let device = Device::Cuda(self.device.clone());
        // SAFETY: the kernels write every element of both.
        let new = |dims: &[usize]| unsafe { empty(dims, DType::F32, &device) };
        Ok((new(&[tokens, heads, d])?, new(&[tokens, heads])?))
    }
}

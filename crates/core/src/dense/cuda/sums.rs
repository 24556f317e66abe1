//! Attention probabilities accumulated per entry.

use super::CudaPool;
use crate::attention::sums_on_device;
use crate::cuda::address;
use crate::{AttentionSums, Batch, Mask, Result};
use candle_core::{DType, Tensor};
use longctx_cuda::upload;
use longctx_kernels::{PAGE, paged};

impl CudaPool {
    pub fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        self.check_queries(batch, q, mask)?;
        if let Mask::Entries(ranges) = mask {
            return self.sums_of_lists(batch, q, lse, ranges);
        }
        let stream = self.stream();
        let mut work = Vec::new();
        for (seq, tokens) in batch.iter() {
            for kv_head in 0..self.shape.kv_heads {
                let sequence = self.seqs.get(&seq);
                work.push(paged::SumsWork {
                    table: sequence.map_or(0, |sequence| sequence.address(&stream, kv_head)),
                    len: sequence.map_or(0, |sequence| sequence.heads[kv_head].len as i32),
                    kv_head: kv_head as i32,
                    queries: tokens.len() as i32,
                    first_token: tokens.start as i32,
                    ..Default::default()
                });
            }
        }
        sums_on_device(&self.device, work, &self.fit(q)?, lse, &self.shape, mask)
    }

    /// Returns the sums of the entries within the ranges, at their indices; 0 elsewhere.
    fn sums_of_lists(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        ranges: &crate::EntryRanges,
    ) -> Result<Vec<AttentionSums>> {
        let (stream, kv_heads) = (self.stream(), self.shape.kv_heads);
        let lists = self.lists(batch, ranges);
        let blocks = self.gather(&lists)?;
        let (start, size) = (address(&blocks)?, self.blocks.size() as u64);
        let addresses: Vec<u64> =
            (0..blocks.dim(0)? as u64).map(|block| start + block * size).collect();
        let addresses = upload(&stream, &addresses)?;
        let mut table = addresses.address();
        let mut work = Vec::new();
        for (i, (_, kv_head, list)) in lists.iter().enumerate() {
            let tokens = &batch.cu_seqlens()[i / kv_heads..];
            work.push(paged::SumsWork {
                table,
                len: list.len() as i32,
                kv_head: *kv_head as i32,
                queries: (tokens[1] - tokens[0]) as i32,
                first_token: tokens[0] as i32,
                ..Default::default()
            });
            table += 8 * list.len().div_ceil(PAGE) as u64;
        }
        let full = Mask::Full;
        let sums = sums_on_device(&self.device, work, &self.fit(q)?, lse, &self.shape, full)?;
        let place = |i: usize| -> Result<Tensor> {
            let (seq, head, list) = &lists[i];
            let sums = sums[i / kv_heads].head(i % kv_heads)?;
            let len = self.seqs.get(seq).map_or(0, |sequence| sequence.heads[*head].len);
            let all = Tensor::zeros((self.shape.heads_per_kv(), len), DType::F32, q.device())?;
            if list.is_empty() {
                return Ok(all);
            }
            let places = Tensor::new(list.as_slice(), q.device())?;
            Ok(all.index_add(&places, &sums, 1)?)
        };
        let of_seq = |seq: usize| {
            let heads = (seq * kv_heads..(seq + 1) * kv_heads).map(place);
            AttentionSums::from_heads(&heads.collect::<Result<Vec<_>>>()?)
        };
        (0..batch.seqs().len()).map(of_seq).collect()
    }
}

//! Attention of a few queries over blocks: one launch that follows a plan, and one that merges its
//! partial results.

use super::CudaPool;
use crate::cuda::address;
use crate::{AttentionState, Batch, Mask, Result};
use candle_core::Tensor;
use longctx_cuda::{Uploaded, cudarc::driver::DevicePtr, upload};
use longctx_kernels::paged::{self, AttendWork, Plan};

/// The properties of a call that determine its plan, besides the lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sizes {
    device: usize,
    heads_per_kv: usize,
    columns: usize,
    /// Thread blocks that the device runs concurrently.
    slots: usize,
}

/// A plan for all layers with the same lengths. The `table` of its work items is an index of a kv
/// head, `[sequences * kv_heads]`, because each layer has its own block tables.
struct SharedPlan {
    sizes: Sizes,
    heads: Vec<AttendWork>,
    plan: Plan,
    merges: Uploaded,
}

impl CudaPool {
    /// Computes attention of queries that have been checked.
    pub(super) fn decode(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
    ) -> Result<AttentionState> {
        let (stream, shape, d) = (self.stream(), &self.shape, self.shape.head_dim);
        let lists = match mask {
            Mask::Entries(ranges) => self.lists(batch, ranges),
            _ => Vec::new(),
        };
        let entries: Vec<u32> = lists.iter().flat_map(|(_, _, list)| list).copied().collect();
        let entries = upload(&stream, &entries)?;
        let lens: Vec<usize> = lists.iter().map(|(_, _, list)| list.len()).collect();
        let window = shape.window.filter(|_| mask == Mask::Causal);
        let heads = self.heads(batch, window, (entries.address(), &lens));
        let columns = match shape.heads_per_kv() * batch.max_seqlen() {
            1 => 1,
            columns => columns.next_power_of_two().min(4),
        };
        let half = self.half();
        let sizes = Sizes {
            device: stream.context().ordinal(),
            heads_per_kv: shape.heads_per_kv(),
            columns,
            slots: paged::attend_slots(stream.context(), half, d, columns)?,
        };
        let fits = |of: &SharedPlan| of.sizes == sizes && of.heads == heads;
        let shared = batch.shared(fits, || {
            let plan = Plan::new(&heads, sizes.heads_per_kv, columns, sizes.slots);
            let merges = upload(&stream, &plan.merges)?;
            Ok(SharedPlan { sizes, heads: heads.clone(), plan, merges })
        })?;
        let work = upload(&stream, &self.with_tables(batch, &shared.plan.work))?;
        let (out, lse) = self.outputs(batch)?;
        let parts = shared.plan.parts * columns;
        // SAFETY: the kernels write every element of these that is read.
        let workspace = unsafe { stream.alloc::<f32>(parts * (d + 2)) }?;
        let part_out = workspace.device_ptr(&stream).0;
        let part_max = part_out + 4 * (parts * d) as u64;
        let args = paged::AttendArgs {
            q: address(q)?,
            out: address(&out)?,
            lse: address(&lse)?,
            part_out,
            part_max,
            part_sum: part_max + 4 * parts as u64,
            work: work.address(),
            merges: shared.merges.address(),
            heads: shape.heads as i32,
            heads_per_kv: shape.heads_per_kv() as i32,
            columns: columns as i32,
            causal: (mask == Mask::Causal).into(),
            window: window.map_or(0, |window| window.min(1 << 30) as i32),
            scale: shape.scale,
            soft_cap: shape.soft_cap.unwrap_or(0.0),
            head_dim: d as i32,
        };
        let counts = (shared.plan.work.len(), shared.plan.merges.len());
        // SAFETY: the tables name blocks of the pool, all arrays have the sizes that the kernels
        // expect, and the stream frees no memory before they have used it.
        unsafe { paged::attend(&stream, half, d, &args, counts) }?;
        Ok(AttentionState { out, lse })
    }

    /// Returns a work item for each kv head of the batch's sequences, whose `table` is its index.
    /// If there are lists of entries, `lists` is their address and lengths.
    fn heads(
        &self,
        batch: &Batch,
        window: Option<usize>,
        lists: (u64, &[usize]),
    ) -> Vec<AttendWork> {
        let (mut entries, lens) = lists;
        let mut heads = Vec::with_capacity(batch.seqs().len() * self.shape.kv_heads);
        for (seq, tokens) in batch.iter() {
            let sequence = self.seqs.get(&seq);
            for kv_head in 0..self.shape.kv_heads {
                let mut work = AttendWork {
                    table: heads.len() as u64,
                    kv_head: kv_head as i32,
                    queries: tokens.len() as i32,
                    first_token: tokens.start as i32,
                    len: sequence.map_or(0, |sequence| sequence.heads[kv_head].len as i32),
                    ..Default::default()
                };
                if let Some(&len) = lens.get(heads.len()) {
                    (work.entries, work.len) = (entries, len as i32);
                    entries += 4 * len as u64;
                }
                let oldest = window.map_or(0, |window| {
                    (work.len as usize + 1).saturating_sub(tokens.len() + window)
                });
                (work.from, work.to) = (oldest as i32, work.len);
                heads.push(work);
            }
        }
        heads
    }

    /// Returns the work items with the addresses of this layer's block tables.
    fn with_tables(&self, batch: &Batch, work: &[AttendWork]) -> Vec<AttendWork> {
        let (stream, kv_heads) = (self.stream(), self.shape.kv_heads);
        let table = |seq| match self.seqs.get(seq) {
            Some(sequence) => (sequence.address(&stream, 0), 8 * sequence.max_blocks as u64),
            None => (0, 0),
        };
        let tables: Vec<(u64, u64)> = batch.seqs().iter().map(table).collect();
        let with_table = |work: &AttendWork| {
            let (first, of_head) = tables[work.table as usize / kv_heads];
            AttendWork { table: first + work.kv_head as u64 * of_head, ..*work }
        };
        work.iter().map(with_table).collect()
    }
}

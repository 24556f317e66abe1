//! Attention of a few queries over blocks: one launch that follows a plan.

use std::sync::Arc;

use super::CudaPool;
use crate::cuda::{address, out_kind};
use crate::{AttentionState, Batch, Mask, Result};
use candle_core::Tensor;
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use longctx_cuda::{Uploaded, upload};
use longctx_kernels::paged::{self, AttendWork, Plan, TILE};

/// The properties of a call that determine its plan, besides the lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sizes {
    /// Address of the stream, whose order protects the workspace.
    stream: usize,
    heads_per_kv: usize,
    head_dim: usize,
    columns: usize,
    /// Thread blocks that the device runs concurrently.
    slots: usize,
}

/// A plan and its workspace for all layers with the same lengths.
struct SharedPlan {
    sizes: Sizes,
    heads: Vec<AttendWork>,
    plan: Plan,
    work: Uploaded,
    parts: CudaSlice<f32>,
    arrived: CudaSlice<u32>,
}

impl SharedPlan {
    fn new(stream: &Arc<CudaStream>, sizes: Sizes, heads: Vec<AttendWork>) -> Result<Self> {
        let plan = Plan::new(&heads, sizes.heads_per_kv, sizes.columns, sizes.slots);
        let work = upload(stream, &plan.work)?;
        let count = plan.parts * sizes.columns * (sizes.head_dim + 2);
        // SAFETY: the kernel writes every element that it reads.
        let parts = unsafe { stream.alloc::<f32>(count) }?;
        let arrived = stream.alloc_zeros::<u32>(plan.merges)?;
        Ok(Self { sizes, heads, plan, work, parts, arrived })
    }
}

impl CudaPool {
    /// Computes attention of queries that have been checked.
    pub(super) fn decode(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
    ) -> Result<AttentionState> {
        let (out, lse) = self.outputs(batch)?;
        self.launch_decode(batch, q, mask, (&out, Some(&lse)))?;
        Ok(AttentionState { out, lse })
    }

    /// Computes attention into an output of f16, bf16 or f32 and, if given, the log-sum-exps.
    pub(super) fn launch_decode(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        (out, lse): (&Tensor, Option<&Tensor>),
    ) -> Result<()> {
        let (stream, shape, head_dim) = (self.stream(), &self.shape, self.shape.head_dim);
        let lists = match mask {
            Mask::Entries(ranges) => self.lists(batch, ranges),
            _ => Vec::new(),
        };
        let entries: Vec<u32> = lists.iter().flat_map(|(_, _, list)| list).copied().collect();
        let entries = upload(&stream, &entries)?;
        let lens: Vec<usize> = lists.iter().map(|(_, _, list)| list.len()).collect();
        let window = shape.window.filter(|_| mask == Mask::Causal);
        let heads = self.heads(batch, window, (entries.address(), &lens));
        let columns = paged::columns(shape.heads_per_kv(), batch.max_seqlen());
        let half = self.half();
        let sizes = Sizes {
            stream: stream.cu_stream() as usize,
            heads_per_kv: shape.heads_per_kv(),
            head_dim,
            columns,
            slots: paged::attend_slots(stream.context(), half, head_dim, columns)?,
        };
        let fits = |of: &SharedPlan| of.sizes == sizes && of.heads == heads;
        let make = || SharedPlan::new(&stream, sizes, heads.clone());
        let SharedPlan { plan, work, parts, arrived, .. } = &*batch.shared(fits, make)?;
        let tables = self.tables(batch)?;
        let part_out = parts.device_ptr(&stream).0;
        let of_parts = 4 * (plan.parts * columns) as u64;
        let part_max = part_out + head_dim as u64 * of_parts;
        let args = paged::AttendArgs {
            q: address(q)?,
            out: address(out)?,
            lse: lse.map_or(Ok(0), address)?,
            part_out,
            part_max,
            part_sum: part_max + of_parts,
            arrived: arrived.device_ptr(&stream).0,
            work: work.address(),
            tables: tables.address(),
            heads: shape.heads as i32,
            heads_per_kv: shape.heads_per_kv() as i32,
            causal: (mask == Mask::Causal).into(),
            window: window.map_or(0, |window| window.min(1 << 30) as i32),
            scale: shape.scale,
            soft_cap: shape.soft_cap.unwrap_or(0.0),
            head_dim: head_dim as i32,
            out_kind: out_kind(out)?,
        };
        // SAFETY: the tables name blocks of the pool, all arrays have the sizes that the kernel
        // expects, and the stream frees no memory before it has used it.
        Ok(unsafe { paged::attend(&stream, half, &args, (plan.work.len(), columns)) }?)
    }

    /// Returns a work item for each kv head of the batch's sequences. If there are lists of entries,
    /// `lists` is their address and lengths.
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
                    table: heads.len() as i32,
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
                (work.from, work.to) = ((oldest / TILE * TILE) as i32, work.len);
                heads.push(work);
            }
        }
        heads
    }
}

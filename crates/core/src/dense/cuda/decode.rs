//! Attention of a few queries over blocks: one launch that follows a plan.

use std::ops::Range;
use std::sync::Arc;

use super::CudaPool;
use crate::cuda::{PlanLaunch, PlanMemory, address, out_kind};
use crate::{AttentionState, Batch, Mask, Result};
use candle_core::Tensor;
use longctx_cuda::cudarc::driver::CudaStream;
use longctx_cuda::upload;
use longctx_kernels::paged::{self, AttendWork, Plan, TILE};

/// The properties of a call that determine its plan, besides the lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sizes {
    /// Address of the stream, whose order protects the workspace.
    stream: usize,
    heads_per_kv: usize,
    head_dim: usize,
    columns: usize,
    /// Thread blocks that the device runs concurrently.
    slots: usize,
}

/// A plan for all layers with the same lengths.
pub(super) struct SharedPlan {
    sizes: Sizes,
    heads: Vec<AttendWork>,
    pub plan: Plan,
    memory: PlanMemory,
}

impl SharedPlan {
    fn new(sizes: Sizes, heads: Vec<AttendWork>) -> Self {
        let plan = Plan::new(&heads, sizes.heads_per_kv, sizes.columns, sizes.slots);
        Self { sizes, heads, plan, memory: PlanMemory::default() }
    }

    pub fn columns(&self) -> usize {
        self.sizes.columns
    }

    /// Returns the largest numbers of work items and merges of a plan for as many heads.
    pub fn limits(&self) -> (usize, usize) {
        let merges = self.heads.len() * self.sizes.heads_per_kv.div_ceil(self.sizes.columns);
        (self.sizes.slots + merges, merges)
    }

    /// Returns the addresses of the list and the workspace.
    fn launch(&self, stream: &Arc<CudaStream>) -> Result<PlanLaunch> {
        let Self { sizes, plan, memory, .. } = self;
        let parts = (plan.parts, part_len(sizes.columns, sizes.head_dim));
        memory.launch(stream, &plan.work, parts, plan.merges)
    }
}

/// The results of attention.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a> {
    /// f16, bf16 or f32.
    pub out: &'a Tensor,
    /// Address of the log-sum-exps; 0: none.
    pub lse: u64,
    pub scores: Option<Scores>,
}

/// The scores of entries, `[tokens, heads, row]`, f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scores {
    pub address: u64,
    pub row: usize,
}

/// Returns the elements of a partial result.
pub(super) fn part_len(columns: usize, head_dim: usize) -> usize {
    columns * (head_dim + 2)
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
        let outputs = Outputs { out: &out, lse: address(&lse)?, scores: None };
        self.launch_decode(batch, q, mask, outputs)?;
        Ok(AttentionState { out, lse })
    }

    /// Computes attention.
    pub(super) fn launch_decode(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        outputs: Outputs<'_>,
    ) -> Result<()> {
        if let Some(prepared) = self.prepared_for(batch)? {
            let launch = (prepared.attend, prepared.columns);
            return self.launch_attend(q, mask, outputs, launch, (prepared.tables, true));
        }
        let stream = self.stream();
        let lists = match mask {
            Mask::Entries(ranges) => self.lists(batch, ranges),
            _ => Vec::new(),
        };
        let entries: Vec<u32> = lists.iter().flat_map(|(_, _, list)| list).copied().collect();
        let entries = upload(&stream, &entries)?;
        let lens: Vec<usize> = lists.iter().map(|(_, _, list)| list.len()).collect();
        let plan = self.plan(batch, mask, (entries.address(), &lens))?;
        let tables = self.tables(batch)?;
        let launch = (plan.launch(&stream)?, plan.columns());
        self.launch_attend(q, mask, outputs, launch, (tables.address(), false))
    }

    /// Returns the plan of attention, which layers with equal lengths share. If there are lists of
    /// entries, `lists` is their address and lengths.
    pub(super) fn plan(
        &self,
        batch: &Batch,
        mask: Mask<'_>,
        lists: (u64, &[usize]),
    ) -> Result<Arc<SharedPlan>> {
        let (sizes, window) = (self.sizes(batch)?, self.window(mask));
        let make = || SharedPlan::new(sizes, self.heads(batch, window, lists));
        if !lists.1.is_empty() {
            return Ok(Arc::new(make()));
        }
        let kv_heads = self.shape.kv_heads;
        let same = |of: &SharedPlan| {
            let mut seqs = batch.iter().zip(of.heads.chunks(kv_heads)).enumerate();
            // A layer with another number of kv heads has another number of work items.
            of.heads.len() == batch.seqs().len() * kv_heads
                && seqs.all(|(i, ((seq, tokens), works))| {
                    let tables = self.seqs.get(&seq).map(|of| &of.heads);
                    works.iter().enumerate().all(|(kv_head, work)| {
                        let len = tables.map_or(0, |tables| tables[kv_head].len);
                        *work == self.work((i * kv_heads, kv_head), &tokens, (0, len), window)
                    })
                })
        };
        batch.shared(|of: &SharedPlan| of.sizes == sizes && same(of), || Ok(make()))
    }

    /// Returns the properties of a plan. Once it has succeeded for a number of columns it does not
    /// fail for the same.
    pub(super) fn sizes(&self, batch: &Batch) -> Result<Sizes> {
        let (stream, shape, head_dim) = (self.stream(), &self.shape, self.shape.head_dim);
        let queries = batch.iter().map(|(_, tokens)| tokens.len());
        let most = queries.filter(|&queries| self.decodes(queries)).max().unwrap_or(1);
        let columns = paged::columns(shape.heads_per_kv(), most);
        Ok(Sizes {
            stream: stream.cu_stream() as usize,
            heads_per_kv: shape.heads_per_kv(),
            head_dim,
            columns,
            slots: self.slots(columns)?,
        })
    }

    /// Returns the number of thread blocks of `columns` columns, 8 or 16, that the device runs
    /// concurrently.
    fn slots(&self, columns: usize) -> Result<usize> {
        let known = &self.slots[columns / 8 - 1];
        if let Some(&slots) = known.get() {
            return Ok(slots);
        }
        let (stream, head_dim) = (self.stream(), self.shape.head_dim);
        let slots = paged::attend_slots(stream.context(), self.half(), head_dim, columns)?;
        Ok(*known.get_or_init(|| slots))
    }

    /// Returns the sliding window of a call, if it has one.
    fn window(&self, mask: Mask<'_>) -> Option<usize> {
        self.shape.window.filter(|_| mask == Mask::Causal)
    }

    /// Launches attention. `early`: the launch before is that of an append to the same sequences.
    pub(super) fn launch_attend(
        &self,
        q: &Tensor,
        mask: Mask<'_>,
        Outputs { out, lse, scores }: Outputs<'_>,
        (launch, columns): (PlanLaunch, usize),
        (tables, early): (u64, bool),
    ) -> Result<()> {
        let (shape, head_dim) = (&self.shape, self.shape.head_dim);
        let of_parts = 4 * (launch.max_parts * columns) as u64;
        let part_max = launch.parts + head_dim as u64 * of_parts;
        let args = paged::AttendArgs {
            q: address(q)?,
            out: address(out)?,
            lse,
            part_out: launch.parts,
            part_max,
            part_sum: part_max + of_parts,
            arrived: launch.arrived,
            work: launch.work,
            tables,
            heads: shape.heads as i32,
            heads_per_kv: shape.heads_per_kv() as i32,
            causal: (mask == Mask::Causal).into(),
            window: self.window(mask).map_or(0, |window| window.min(1 << 30) as i32),
            scale: shape.scale,
            soft_cap: shape.soft_cap.unwrap_or(0.0),
            head_dim: head_dim as i32,
            out_kind: out_kind(out)?,
            scores: scores.map_or(0, |scores| scores.address),
            scores_row: scores.map_or(0, |scores| scores.row as i32),
            early: early.into(),
        };
        let size = (launch.items, columns);
        // SAFETY: the tables name blocks of the pool, all arrays have the sizes that the kernel
        // expects, and the stream frees no memory before it has used it.
        Ok(unsafe { paged::attend(&self.stream(), self.half(), &args, size) }?)
    }

    /// Returns the work items of the kv heads of the batch's sequences. If there are lists of
    /// entries, `lists` is their address and lengths.
    fn heads(
        &self,
        batch: &Batch,
        window: Option<usize>,
        (mut entries, lens): (u64, &[usize]),
    ) -> Vec<AttendWork> {
        let mut heads = Vec::with_capacity(batch.seqs().len() * self.shape.kv_heads);
        for (seq, tokens) in batch.iter() {
            let (first, tables) = (heads.len(), self.seqs.get(&seq).map(|of| &of.heads));
            for kv_head in 0..self.shape.kv_heads {
                let held = tables.map_or(0, |tables| tables[kv_head].len);
                let len = lens.get(heads.len()).copied();
                let list = (if len.is_some() { entries } else { 0 }, len.unwrap_or(held));
                heads.push(self.work((first, kv_head), &tokens, list, window));
                entries += 4 * len.unwrap_or(0) as u64;
            }
        }
        heads
    }

    /// Returns the work item of a kv head. `first`: index of the sequence's first head in the
    /// batch; `entries` and `len`: address of a list and number of entries. A sequence with many
    /// queries has none here.
    fn work(
        &self,
        (first, kv_head): (usize, usize),
        tokens: &Range<usize>,
        (entries, len): (u64, usize),
        window: Option<usize>,
    ) -> AttendWork {
        let queries = if self.decodes(tokens.len()) { tokens.len() } else { 0 };
        let oldest = window.map_or(0, |window| (len + 1).saturating_sub(queries + window));
        AttendWork {
            entries,
            table: (first + kv_head) as i32,
            kv_head: kv_head as i32,
            queries: queries as i32,
            first_token: tokens.start as i32,
            len: len as i32,
            from: (oldest / TILE * TILE) as i32,
            to: len as i32,
            ..AttendWork::default()
        }
    }
}

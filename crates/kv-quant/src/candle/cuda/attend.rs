//! Attention over the records and rings of many sequences, in one launch.

use std::sync::Arc;

use super::CudaPool;
use super::memory::Heads;
use super::tensors::{address, kind};
use crate::cuda::{AttendArgs, AttendKernel, Plan, Sizes, Work};
use candle_core::{DType, Device, Tensor};
use longctx_core::cuda::{PlanLaunch, PlanMemory, empty, out_kind};
use longctx_core::{AttentionState, Batch, Error, Mask, Result, SeqId};
use longctx_cuda::cudarc::driver::CudaStream;

/// A plan for all layers with the same lengths.
pub(super) struct SharedPlan {
    /// Address of the stream, whose order protects the workspace.
    stream: usize,
    head_dim: usize,
    sizes: Sizes,
    heads: Vec<Work>,
    pub plan: Plan,
    memory: PlanMemory,
}

impl SharedPlan {
    /// Returns the addresses of the list and the workspace.
    pub fn launch(&self, stream: &Arc<CudaStream>) -> Result<PlanLaunch> {
        let Self { head_dim, sizes, plan, memory, .. } = self;
        let parts = (plan.parts, part_len(sizes.columns, *head_dim));
        memory.launch(stream, &plan.work, parts, plan.merges)
    }
}

/// Returns the elements of a partial result.
pub(super) fn part_len(columns: usize, head_dim: usize) -> usize {
    columns * (head_dim + 1)
}

impl CudaPool {
    pub fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        let (q, mut heads) = self.queries(batch, q, mask)?;
        let _selected = match mask {
            Mask::Entries(ranges) => Some(self.select(batch, ranges, &mut heads)?),
            _ => None,
        };
        let unpacked = match mask {
            Mask::Full => self.attend_unpacked(batch, &q, &mut heads.work)?,
            _ => None,
        };
        let state = match unpacked {
            Some(state) => state,
            None => self.outputs(batch, DType::F32)?,
        };
        self.attend_records(batch, &q, mask, &heads, &state)?;
        Ok(state)
    }

    /// Computes attention of the heads with queries over their records and rings.
    fn attend_records(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        heads: &Heads,
        state: &AttentionState,
    ) -> Result<()> {
        let queries = heads.work.iter().map(|head| head.queries as usize).max().unwrap_or(0);
        if queries == 0 {
            return Ok(());
        }
        let kernel = self.kernel(batch, queries);
        let launch = self.plan(batch, kernel, mask, &heads.work)?.launch(&self.stream())?;
        let memory = self.memory_on_device(&heads.memory)?;
        self.launch_attend(kernel, q, mask, state, (launch, memory.address()), false)
    }

    /// Returns the kernel for a batch of which no sequence has more than `queries` queries.
    pub(super) fn kernel(&self, batch: &Batch, queries: usize) -> &AttendKernel {
        let heads = batch.seqs().len() * self.shape.kv_heads;
        self.kernels.attend(self.shape.heads_per_kv() * queries, heads)
    }

    /// Returns the sizes that determine a plan.
    pub(super) fn sizes(&self, kernel: &AttendKernel, mask: Mask<'_>) -> Sizes {
        let window = self.shape.window.filter(|_| mask == Mask::Causal);
        kernel.sizes(self.shape.heads_per_kv(), window)
    }

    /// Returns the plan of attention, which layers with equal lengths share.
    pub(super) fn plan(
        &self,
        batch: &Batch,
        kernel: &AttendKernel,
        mask: Mask<'_>,
        heads: &[Work],
    ) -> Result<Arc<SharedPlan>> {
        let sizes = self.sizes(kernel, mask);
        let (stream, head_dim) = (self.stream().cu_stream() as usize, self.shape.head_dim);
        let same = |of: &SharedPlan| {
            (of.stream, of.head_dim, of.sizes) == (stream, head_dim, sizes) && of.heads == heads
        };
        batch.shared(same, || {
            let (plan, memory) = (Plan::new(heads, sizes), PlanMemory::default());
            Ok(SharedPlan { stream, head_dim, sizes, heads: heads.to_vec(), plan, memory })
        })
    }

    /// Launches attention with a work list and the heads' memory. `early`: the launch before is that of
    /// the copy to the rings.
    pub(super) fn launch_attend(
        &self,
        kernel: &AttendKernel,
        q: &Tensor,
        mask: Mask<'_>,
        state: &AttentionState,
        (launch, kv_heads): (PlanLaunch, u64),
        early: bool,
    ) -> Result<()> {
        let of_outs = 4 * (launch.max_parts * kernel.columns() * self.shape.head_dim) as u64;
        let args = AttendArgs {
            q: address(q)?,
            out: address(&state.out)?,
            lse: address(&state.lse)?,
            part_out: launch.parts,
            part_lse: launch.parts + of_outs,
            arrived: launch.arrived,
            work: launch.work,
            kv_heads,
            out_kind: out_kind(&state.out)?,
            ..self.score_args(mask)
        };
        // SAFETY: the arrays have the sizes that the kernel expects, and a stream runs its
        // operations in order.
        Ok(unsafe { kernel.launch(&self.stream(), &args, launch.items, early) }?)
    }

    /// Allocates outputs and log-sum-exps.
    pub(super) fn outputs(&self, batch: &Batch, dtype: DType) -> Result<AttentionState> {
        let (tokens, heads, d) = (batch.tokens(), self.shape.heads, self.shape.head_dim);
        let device = Device::Cuda(self.device.clone());
        // SAFETY: the kernel writes every element of both.
        let new = |dims: &[usize], dtype| unsafe { empty(dims, dtype, &device) };
        let (out, lse) = (new(&[tokens, heads, d], dtype)?, new(&[tokens, heads], DType::F32)?);
        Ok(AttentionState { out, lse })
    }

    /// Returns the checked queries in the pool's dtype, and the heads of their sequences.
    pub(super) fn queries(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
    ) -> Result<(Tensor, Heads)> {
        self.check_q(batch, q)?;
        match mask {
            Mask::Full => {}
            Mask::Causal => self.check_own(batch)?,
            Mask::Entries(ranges) => {
                let lens = |&seq: &SeqId| match self.contains(seq) {
                    true => self.lens(seq),
                    false => vec![0; self.shape.kv_heads],
                };
                ranges.check(&batch.seqs().iter().flat_map(lens).collect::<Vec<_>>())?;
            }
        }
        let q = self.fit(q, self.dtype.unwrap_or(DType::F16))?;
        Ok((q, self.heads_of(batch)?))
    }

    /// Checks the shape of a batch's queries.
    pub(super) fn check_q(&self, batch: &Batch, q: &Tensor) -> Result<()> {
        let tokens = self.shape.check_q(q)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of q", batch.tokens(), tokens));
        }
        Ok(())
    }

    /// Checks that every head holds the entries of the queries' own tokens.
    fn check_own(&self, batch: &Batch) -> Result<()> {
        for (seq, tokens) in batch.iter() {
            let shortest = self.lens(seq).into_iter().min().unwrap_or(0);
            if shortest < tokens.len() {
                let expected = format!("at least its {} own", tokens.len());
                return Err(Error::mismatch(
                    format!("entries of sequence {seq}"),
                    expected,
                    shortest,
                ));
            }
        }
        Ok(())
    }

    /// Returns the arguments that are the same for all kernels that compute scores.
    pub(super) fn score_args(&self, mask: Mask<'_>) -> AttendArgs {
        AttendArgs {
            heads: self.shape.heads as i32,
            heads_per_kv: self.shape.heads_per_kv() as i32,
            ring: self.ring_places() as i32,
            causal: (mask == Mask::Causal) as i32,
            window: self.shape.window.unwrap_or(0) as i32,
            kind: kind(self.dtype.unwrap_or(DType::F16)),
            scale: self.shape.scale,
            soft_cap: self.shape.soft_cap.unwrap_or(0.0),
            ..AttendArgs::default()
        }
    }
}

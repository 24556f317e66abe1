//! Attention over the records and rings of many sequences, in one launch.

use std::sync::Arc;

use super::CudaPool;
use super::tensors::{address, kind};
use crate::cuda::{AttendArgs, Plan, Sizes, Work};
use candle_core::{DType, Device, Tensor};
use longctx_core::cuda::out_kind;
use longctx_core::{AttentionState, Batch, Error, Mask, Result, SeqId};
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use longctx_cuda::upload;

/// A plan and its workspace for all layers with the same lengths. In its work items `table` is an
/// index of a kv head, `[sequences * kv_heads]`, and the other addresses are 0, because each layer
/// has its own.
struct SharedPlan {
    /// Address of the stream, whose order protects the workspace.
    stream: usize,
    head_dim: usize,
    sizes: Sizes,
    heads: Vec<Work>,
    plan: Plan,
    parts: CudaSlice<f32>,
    arrived: CudaSlice<u32>,
}

impl SharedPlan {
    fn new(
        stream: &Arc<CudaStream>,
        head_dim: usize,
        heads: Vec<Work>,
        sizes: Sizes,
    ) -> Result<Self> {
        let plan = Plan::new(&heads, sizes);
        // SAFETY: the kernel writes every element that it reads.
        let parts = unsafe { stream.alloc::<f32>(plan.parts * sizes.columns * (head_dim + 1)) }?;
        let arrived = stream.alloc_zeros::<u32>(plan.merges)?;
        let stream = stream.cu_stream() as usize;
        Ok(Self { stream, head_dim, sizes, heads, plan, parts, arrived })
    }

    /// Returns the work items of a layer with these kv heads.
    fn work(&self, heads: &[Work]) -> Vec<Work> {
        let of_layer = |work: &Work| {
            let Work { table, ring_k, ring_v, valid, .. } = heads[work.table as usize];
            Work { table, ring_k, ring_v, valid, ..*work }
        };
        self.plan.work.iter().map(of_layer).collect()
    }
}

/// Returns a kv head's work item with its index instead of addresses.
fn numbered((i, head): (usize, &Work)) -> Work {
    Work { table: i as u64, ring_k: 0, ring_v: 0, valid: 0, ..*head }
}

impl CudaPool {
    pub fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        self.attend_in(batch, q, mask, DType::F32)
    }

    /// As [`attend`](Self::attend), with an output of dtype f32, f16 or bf16.
    pub(super) fn attend_in(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        dtype: DType,
    ) -> Result<AttentionState> {
        let (q, mut heads) = self.queries(batch, q, mask)?;
        let _selected = match mask {
            Mask::Entries(ranges) => Some(self.select(batch, ranges, &mut heads)?),
            _ => None,
        };
        let unpacked = match mask {
            Mask::Full => self.attend_unpacked(batch, &q, &mut heads)?,
            _ => None,
        };
        let state = match unpacked {
            Some(state) => state,
            None => self.outputs(batch, dtype)?,
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
        heads: &[Work],
        state: &AttentionState,
    ) -> Result<()> {
        let queries = heads.iter().map(|head| head.queries as usize).max().unwrap_or(0);
        if queries == 0 {
            return Ok(());
        }
        let (stream, d, heads_per_kv) =
            (self.stream(), self.shape.head_dim, self.shape.heads_per_kv());
        let kernel = self.kernels.attend(heads_per_kv * queries);
        let window = self.shape.window.filter(|_| mask == Mask::Causal);
        let sizes = kernel.sizes(heads_per_kv, window);
        let same = |of: &SharedPlan| {
            (of.stream, of.head_dim, of.sizes) == (stream.cu_stream() as usize, d, sizes)
                && heads.iter().enumerate().map(numbered).eq(of.heads.iter().copied())
        };
        let shared = batch.shared(same, || {
            SharedPlan::new(&stream, d, heads.iter().enumerate().map(numbered).collect(), sizes)
        })?;
        let SharedPlan { plan, parts, arrived, .. } = &*shared;
        let work = upload(&stream, &shared.work(heads))?;
        let part_out = parts.device_ptr(&stream).0;
        let args = AttendArgs {
            q: address(q)?,
            out: address(&state.out)?,
            lse: address(&state.lse)?,
            part_out,
            part_lse: part_out + 4 * (plan.parts * kernel.columns() * d) as u64,
            arrived: arrived.device_ptr(&stream).0,
            work: work.address(),
            out_kind: out_kind(&state.out)?,
            ..self.score_args(mask)
        };
        // SAFETY: the arrays have the sizes that the kernel expects, and a stream runs its
        // operations in order.
        Ok(unsafe { kernel.launch(&stream, &args, plan.work.len()) }?)
    }

    /// Allocates outputs and log-sum-exps.
    fn outputs(&self, batch: &Batch, dtype: DType) -> Result<AttentionState> {
        let (tokens, heads, d) = (batch.tokens(), self.shape.heads, self.shape.head_dim);
        let device = Device::Cuda(self.device.clone());
        // SAFETY: the kernel writes every element of both.
        let empty = |dims: &[usize], dtype| unsafe { Tensor::empty(dims, dtype, &device) };
        let (out, lse) = (empty(&[tokens, heads, d], dtype)?, empty(&[tokens, heads], DType::F32)?);
        Ok(AttentionState { out, lse })
    }

    /// Returns the checked queries in the pool's dtype, and their work items.
    pub(super) fn queries(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
    ) -> Result<(Tensor, Vec<Work>)> {
        let tokens = self.shape.check_q(q)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of q", batch.tokens(), tokens));
        }
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

//! Attention over the records and rings of many sequences, in one launch.

use super::CudaPool;
use super::tensors::{address, kind, tensor};
use crate::cuda::{AttendArgs, Work};
use candle_core::{DType, Tensor};
use longctx_core::{AttentionState, Batch, Error, Mask, Result, SeqId};
use longctx_cuda::{Upload, cudarc::driver::DevicePtr};

impl CudaPool {
    pub fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        let (q, mut heads) = self.queries(batch, q, mask)?;
        let _selected = match mask {
            Mask::Entries(ranges) => Some(self.select(batch, ranges, &mut heads)?),
            _ => None,
        };
        let (stream, d) = (self.stream(), self.shape.head_dim);
        let kernel = self.kernels.attend(self.shape.heads_per_kv() * batch.max_seqlen());
        let window = self.shape.window.filter(|_| mask == Mask::Causal);
        let plan = kernel.plan(&heads, self.shape.heads_per_kv(), window);
        let rows = batch.tokens() * self.shape.heads;
        let parts = plan.parts * kernel.columns();
        // SAFETY: the kernel writes every element that is read.
        let (out, lse, part_out, part_lse) = unsafe {
            (
                stream.alloc::<f32>(rows * d)?,
                stream.alloc::<f32>(rows)?,
                stream.alloc::<f32>(parts * d)?,
                stream.alloc::<f32>(parts)?,
            )
        };
        let arrived = stream.alloc_zeros::<u32>(plan.joins)?;
        let mut upload = Upload::default();
        upload.push(&plan.work);
        let work = upload.copy(&stream)?;
        let args = AttendArgs {
            q: address(&q)?,
            out: out.device_ptr(&stream).0,
            lse: lse.device_ptr(&stream).0,
            part_out: part_out.device_ptr(&stream).0,
            part_lse: part_lse.device_ptr(&stream).0,
            arrived: arrived.device_ptr(&stream).0,
            work: work.as_ref().map_or(0, |work| work.device_ptr(&stream).0),
            ..self.score_args(mask)
        };
        // SAFETY: the arrays have the sizes that the kernel expects, and a stream runs its
        // operations in order.
        unsafe { kernel.launch(&stream, &args, plan.work.len())? };
        Ok(AttentionState {
            out: tensor(&self.device, out, &[batch.tokens(), self.shape.heads, d]),
            lse: tensor(&self.device, lse, &[batch.tokens(), self.shape.heads]),
        })
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
            out_kind: 2,
            scale: self.shape.scale,
            soft_cap: self.shape.soft_cap.unwrap_or(0.0),
            ..AttendArgs::default()
        }
    }
}

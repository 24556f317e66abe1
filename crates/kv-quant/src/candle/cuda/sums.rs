//! Attention probabilities accumulated per entry, in one launch.

use super::CudaPool;
use super::head::Head;
use super::tensors::{address, tensor};
use crate::cuda::{AttendArgs, TILE};
use candle_core::{DType, Tensor};
use longctx_core::{AttentionSums, Batch, Error, Mask, Result, SeqId};
use longctx_cuda::{cudarc::driver::DevicePtr, upload};

impl CudaPool {
    /// Returns the attention probabilities that the entries of each sequence receive.
    pub fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        let (q, mut heads) = self.queries(batch, q, mask)?;
        let _selected = match mask {
            Mask::Entries(ranges) => Some(self.mark(batch, ranges, &mut heads)?),
            _ => None,
        };
        let (stream, per) = (self.stream(), self.shape.heads_per_kv());
        if lse.dims() != [batch.tokens(), self.shape.heads] {
            let expected = format!("[{}, {}]", batch.tokens(), self.shape.heads);
            return Err(Error::mismatch("lse", expected, format!("{:?}", lse.dims())));
        }
        let lse = self.fit(lse, DType::F32)?;
        let (mut lens, mut total, mut tiles) = (Vec::new(), 0, 0);
        for head in &mut heads.work {
            let (packed, residual) = (head.packed as usize, head.residual as usize);
            head.sums = total as i64;
            total += per * (packed + residual);
            tiles = tiles.max(packed.div_ceil(TILE) + residual.div_ceil(TILE));
            lens.push(packed + residual);
        }
        // SAFETY: the kernel writes an element for every entry of every head.
        let out = unsafe { stream.alloc::<f32>(total.max(1)) }?;
        let memory = self.memory_on_device(&heads.memory)?;
        let on_device = upload(&stream, &heads.work)?;
        let args = AttendArgs {
            q: address(&q)?,
            out: out.device_ptr(&stream).0,
            lse: address(&lse)?,
            work: on_device.address(),
            kv_heads: memory.address(),
            ..self.score_args(mask)
        };
        // SAFETY: the arrays have the sizes that the kernel expects.
        unsafe {
            self.kernels.sums(&stream, &args, (heads.work.len(), tiles, batch.max_seqlen()))?
        };
        let all = tensor(&self.device, out, &[total.max(1)]);
        let mut lens = lens.chunks(self.shape.kv_heads);
        let mut first = 0;
        let of_seq = |seq: &SeqId| {
            let slots = lens.next().unwrap_or_default().to_vec();
            let count = per * slots.iter().sum::<usize>();
            let sums = AttentionSums::new(all.narrow(0, first, count)?, per, slots)?;
            first += count;
            self.without_holes(*seq, sums)
        };
        batch.seqs().iter().map(of_seq).collect()
    }

    /// Returns the sums of entries from those of all slots.
    fn without_holes(&self, seq: SeqId, sums: AttentionSums) -> Result<AttentionSums> {
        let heads = self.seqs.get(&seq).map_or(&[][..], |of| &of.heads);
        if heads.iter().all(|head| head.valid.holes() == 0) {
            return Ok(sums);
        }
        let of_entries = |(own, head): (Tensor, &Head)| match head.entry_slots() {
            Some(slots) => Ok(own.index_select(&Tensor::new(slots, own.device())?, 1)?),
            None => Ok(own),
        };
        let heads = sums.split()?.into_iter().zip(heads).map(of_entries);
        AttentionSums::from_heads(&heads.collect::<Result<Vec<_>>>()?)
    }
}

//! One launch that sums attention probabilities up by entry.

use super::CudaPool;
use super::args::AttendArgs;
use super::head::Head;
use super::kernels::TILE;
use super::tensors::{address, tensor};
use candle_core::{DType, Tensor};
use longctx_core::{Batch, Error, Mask, Result};
use longctx_cuda::cudarc::driver::DevicePtr;

impl CudaPool {
    /// For each kv head of each sequence, the probabilities that its entries receive, `[group,
    /// entries]`.
    pub fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<Tensor>> {
        let (q, mut work) = self.queries(batch, q, mask)?;
        let _selected = match mask {
            Mask::Entries(ranges) => Some(self.mark(batch, ranges, &mut work)?),
            _ => None,
        };
        let (stream, per) = (self.stream(), self.shape.group());
        if lse.dims() != [batch.tokens(), self.shape.heads] {
            let expected = format!("[{}, {}]", batch.tokens(), self.shape.heads);
            return Err(Error::mismatch("lse", expected, format!("{:?}", lse.dims())));
        }
        let lse = self.fit(lse, DType::F32)?;
        let (mut lens, mut total, mut tiles) = (Vec::new(), 0, 0);
        for head in &mut work {
            let (packed, residual) = (head.packed as usize, head.residual as usize);
            head.sums = total as i64;
            total += per * (packed + residual);
            tiles = tiles.max(packed.div_ceil(TILE) + residual.div_ceil(TILE));
            lens.push(packed + residual);
        }
        let blocks = if batch.longest() > 1 { per } else { per.div_ceil(8) };
        // SAFETY: the kernel writes a number for every entry of every head.
        let out = unsafe { stream.alloc::<f32>(total.max(1)) }?;
        let on_device = stream.clone_htod(&work)?;
        let args = AttendArgs {
            q: address(&q)?,
            out: out.device_ptr(&stream).0,
            lse: address(&lse)?,
            work: on_device.device_ptr(&stream).0,
            ..self.score_args(mask)
        };
        // SAFETY: the sizes above are those that the kernel counts with.
        unsafe { self.kernels.sums(&stream, &args, (tiles, work.len(), blocks))? };
        let all = tensor(&self.device, out, &[total.max(1)]);
        let mut first = 0;
        let mut sums = Vec::with_capacity(lens.len());
        for (i, slots) in lens.into_iter().enumerate() {
            let own = all.narrow(0, first, per * slots)?.reshape((per, slots))?;
            first += per * slots;
            let (seq, head) = (i / self.shape.kv_heads, i % self.shape.kv_heads);
            let head = self.seqs.get(&batch.seqs()[seq]).map(|of| &of.heads[head]);
            sums.push(match head.and_then(Head::entry_slots) {
                Some(slots) => own.index_select(&Tensor::new(slots, own.device())?, 1)?,
                None => own,
            });
        }
        Ok(sums)
    }
}

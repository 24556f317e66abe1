//! One launch that sums attention probabilities up by entry.

use super::CudaPool;
use super::args::AttendArgs;
use super::kernels::TILE;
use super::tensors::address;
use candle_core::{DType, Tensor};
use longctx_core::{Batch, Error, Mask, Result};
use longctx_cuda::cudarc::driver::DevicePtr;

impl CudaPool {
    /// For each query head of each sequence, the probabilities that its entries receive. Waits for
    /// the device.
    pub fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let (q, mut work) = self.queries(batch, q, mask)?;
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
            lens.extend(vec![packed + residual; per]);
        }
        if total == 0 {
            return Ok(vec![Vec::new(); lens.len()]);
        }
        let blocks = if batch.longest() > 1 { per } else { per.div_ceil(8) };
        // SAFETY: the kernel writes a number for every entry of every head.
        let out = unsafe { stream.alloc::<f32>(total) }?;
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
        let all = stream.clone_dtoh(&out)?;
        let mut rest = all.as_slice();
        let take = |len| {
            let (own, more) = rest.split_at(len);
            rest = more;
            own.to_vec()
        };
        Ok(lens.into_iter().map(take).collect())
    }
}

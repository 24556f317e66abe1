//! One launch that sums attention probabilities up by token.

use super::CudaStore;
use super::args::AttendArgs;
use super::held::{Held, with_address};
use super::wrap;
use candle_core::cuda::cudarc::driver::DevicePtr;
use candle_core::{DType, Storage, Tensor};
use longctx_core::{Error, Result, Visible};

impl CudaStore {
    /// For each query head of each batch entry, what every token receives. Waits for the device.
    pub(super) fn launch_mass(
        &self,
        held: &Held,
        q: &Tensor,
        lse: &Tensor,
        visible: Visible,
    ) -> Result<Vec<Vec<f32>>> {
        let (heads, queries) = (self.shape.heads, q.dim(2)?);
        if lse.dims() != [held.batch, heads, queries] {
            let expected = format!("[{}, {heads}, {queries}]", held.batch);
            return Err(Error::mismatch("log-sum-exp", expected, format!("{:?}", lse.dims())));
        }
        let stream = self.device.cuda_stream();
        let lse = lse.to_dtype(DType::F32)?.contiguous()?;
        let (storage, layout) = lse.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::mismatch("tensor", "one on a CUDA device", "one elsewhere"));
        };
        let lse = storage.as_cuda_slice::<f32>()?.slice(layout.start_offset()..);
        // SAFETY: the kernel writes a number for every token of every head.
        let out = unsafe { stream.alloc::<f32>(held.batch * heads * held.len) }.map_err(wrap)?;
        with_address(q, q, &stream, |q, _| {
            let args = AttendArgs {
                q,
                out: out.device_ptr(&stream).0,
                lse: lse.device_ptr(&stream).0,
                ..self.over(held, queries, visible)
            };
            // SAFETY: the sizes above are those that the kernel counts with.
            unsafe { self.kernels.mass(&stream, &args, held.rows) }
        })?;
        let all = stream.clone_dtoh(&out).map_err(wrap)?;
        Ok(all.chunks_exact(held.len).map(<[f32]>::to_vec).collect())
    }
}

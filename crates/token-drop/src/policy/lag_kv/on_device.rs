//! Scores on a CUDA device, in one launch: kernels/lag_kv.cu.
#![allow(unsafe_code)]

use super::LagKv;
use candle_core::{CudaDevice, DType, Tensor};
use longctx_core::Result;
use longctx_core::cuda::address;
use longctx_cuda::Image;

static IMAGE: Image = longctx_cuda::image!("lag_kv");

/// Must equal the kernel's constant.
const THREADS: u32 = 256;

longctx_cuda::args! {
    /// The kernel's arguments, with the same layout as there.
    struct LagKvArgs: 48, entries at 24 {
        /// `[kv_heads, entries, key_channels]`, f32.
        keys: u64,
        /// `[kv_heads, entries, value_channels]`, f32.
        values: u64,
        /// Output: `[kv_heads, entries]`, f32. Only scored partitions are written.
        scores: u64,
        entries: i32,
        /// Entries before the first partition.
        sinks: i32,
        /// Entries of a partition.
        lag: i32,
        key_channels: i32,
        value_channels: i32,
        padding: i32,
    }
}

/// Returns the scores `[kv_heads, entries]`, whose first `scored` partitions have a successor.
/// `keys`, `values`: `[kv_heads, entries, channels]` on the device.
pub fn score(
    device: &CudaDevice,
    keys: &Tensor,
    values: &Tensor,
    policy: &LagKv,
    scored: usize,
) -> Result<Tensor> {
    let f32 = |x: &Tensor| x.to_dtype(DType::F32)?.contiguous();
    let (keys, values) = (f32(keys)?, f32(values)?);
    let ((heads, len, key_channels), value_channels) = (keys.dims3()?, values.dim(2)?);
    let scores = Tensor::ones((heads, len), DType::F32, keys.device())?;
    let args = LagKvArgs {
        keys: address(&keys)?,
        values: address(&values)?,
        scores: address(&scores)?,
        entries: len as i32,
        sinks: policy.sinks as i32,
        lag: policy.lag as i32,
        key_channels: key_channels as i32,
        value_channels: value_channels as i32,
        padding: 0,
    };
    let stream = device.cuda_stream();
    let shared = 2 * (policy.lag + key_channels.max(value_channels)) * size_of::<f32>();
    let kernel = IMAGE.kernel(stream.context(), "lag_kv", THREADS, shared as u32)?;
    // SAFETY: the arrays have these sizes: `score` of the policy checked that `scored + 1`
    // partitions fit after the sinks. The stream frees no memory before the launch has used it.
    unsafe { kernel.launch(&stream, [scored, heads, 1], &args) }?;
    Ok(scores)
}

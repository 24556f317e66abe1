//! Attention over f16 and bf16 on a CUDA device: which kernel serves, and what candle's tensors
//! have to be for it.
#![allow(unsafe_code)]

mod prefill;
mod sums;

pub use sums::{sums_of_call, sums_on_device};

use std::sync::Once;

use crate::{AttentionShape, AttentionState, Batch, Mask, Result};
use candle_core::{CudaDevice, DType, Device, Tensor};

/// Causal attention of each sequence's queries over the keys of the same tokens, all in one launch:
/// as [`attend`](super::attend). `None` where there is no kernel.
pub fn attend_batch(
    batch: &Batch,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<Option<AttentionState>> {
    let Some(device) = served(q, k, v, shape)? else { return Ok(None) };
    let lens = batch.cu_seqlens_on(q.device())?;
    prefill::attend(device, [q, k, v], (&lens, &lens), shape, Mask::Causal).map(Some)
}

/// Whether a device has kernels for keys and values of a dtype, and a shape. Where it has none,
/// candle's operations are right, too, but slow: said once.
pub fn has_kernels(device: &CudaDevice, dtype: DType, shape: &AttentionShape) -> Result<bool> {
    static SAID: Once = Once::new();
    if matches!(dtype, DType::F16 | DType::BF16)
        && shape.value_dim == shape.head_dim
        && shape.window != Some(0)
        && crate::cuda::has_prefill(device.cuda_stream().context(), shape.head_dim)?
    {
        return Ok(true);
    }
    SAID.call_once(|| {
        log::warn!(
            "this CUDA device has no kernel for attention over {} with heads of {} and {} channels: \
             matrix products instead, which are slower",
            dtype.as_str(),
            shape.head_dim,
            shape.value_dim
        );
    });
    Ok(false)
}

/// The device, if it has kernels for these tensors.
fn served<'a>(
    q: &'a Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<Option<&'a CudaDevice>> {
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let served = v.dtype() == k.dtype() && has_kernels(device, k.dtype(), shape)?;
    Ok(served.then_some(device))
}

/// A view as it is if its rows begin at multiples of 16 bytes, or else a contiguous copy.
fn rows(x: &Tensor) -> Result<Tensor> {
    let layout = x.layout();
    let aligned = layout.start_offset().is_multiple_of(8)
        && layout.stride()[2] == 1
        && strides(x).iter().all(|stride| *stride > 0 && stride % 8 == 0);
    Ok(if aligned { x.clone() } else { x.force_contiguous()? })
}

/// Strides of tokens and heads. A dimension of one has no stride that counts: it gets a row's length.
fn strides(x: &Tensor) -> [i64; 2] {
    let (dims, strides) = (x.dims(), x.stride());
    [0, 1].map(|i| if dims[i] == 1 { dims[2] } else { strides[i] } as i64)
}

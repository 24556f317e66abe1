//! Attention over f16 and bf16 on a CUDA device: which kernel serves, and what candle's tensors
//! have to be for it.
#![allow(unsafe_code)]

mod decode;
mod prefill;

use std::sync::Once;

use crate::{AttentionShape, AttentionState, Batch, Mask, Result};
use candle_core::{CudaDevice, DType, Device, Tensor};

/// Query heads of a kv head times queries up to which the decode kernel reads the keys once for
/// each; beyond, tiles that share them are faster.
const MOST_COLUMNS: usize = 16;

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

/// One sequence's attention: q `[tokens, heads, head_dim]`, keys and values
/// `[entries, kv_heads, channels]`. `None` where there is no kernel.
pub fn attend_one(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Option<AttentionState>> {
    let Some(device) = served(q, k, v, shape)? else { return Ok(None) };
    let (queries, entries) = (q.dim(0)?, k.dim(0)?);
    if entries == 0 || (mask == Mask::Causal && entries < queries) {
        return Ok(None);
    }
    if shape.group() * queries <= MOST_COLUMNS
        && let Some(state) = decode::attend(device, q, k, v, shape, mask)?
    {
        return Ok(Some(state));
    }
    let lens = Tensor::new(&[[0, queries as u32], [0, entries as u32]], q.device())?;
    let lens = (&lens.get(0)?, &lens.get(1)?);
    prefill::attend(device, [q, k, v], lens, shape, mask).map(Some)
}

/// The device, if its kernels know the shape and the formats. Where they do not, candle's operations
/// are right, too, but slow: said once.
fn served<'a>(
    q: &'a Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<Option<&'a CudaDevice>> {
    static SAID: Once = Once::new();
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let halves = matches!(k.dtype(), DType::F16 | DType::BF16) && v.dtype() == k.dtype();
    let head_dim = shape.head_dim;
    if halves
        && shape.value_dim == head_dim
        && shape.window != Some(0)
        && crate::cuda::has_prefill(device.cuda_stream().context(), head_dim)?
    {
        return Ok(Some(device));
    }
    SAID.call_once(|| {
        log::warn!(
            "this CUDA device has no kernel for attention over {} with heads of {} and {} channels: \
             matrix products instead, which are slower",
            k.dtype().as_str(),
            head_dim,
            shape.value_dim
        );
    });
    Ok(None)
}

//! Attention over f16 and bf16 on a CUDA device: kernel selection and the tensor layouts that the
//! kernels accept.
#![allow(unsafe_code)]

mod prefill;
mod sums;

pub use sums::{sums_of_call, sums_on_device};

use std::sync::Once;

use crate::{AttentionShape, AttentionState, Batch, Error, Mask, Result};
use candle_core::{CudaDevice, DType, Device, Tensor};

/// Causal attention of each sequence's queries over the keys of the same tokens, in one launch. See
/// [`attend`](super::attend). Returns `None` if no kernel supports the tensors.
pub fn attend_batch(
    batch: &Batch,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<Option<AttentionState>> {
    let Some(device) = supported_device(q, k, v, shape)? else { return Ok(None) };
    let lens = batch.cu_seqlens_on(q.device())?;
    prefill::attend(device, [q, k, v], (&lens, &lens), shape, Mask::Causal).map(Some)
}

/// Attention of each sequence's queries `[tokens, heads, head_dim]` over its past: keys and values
/// `[past, kv_heads, head_dim]`, in which sequence `i` of the batch has the tokens
/// `cu_seqlens_k[i]..cu_seqlens_k[i + 1]`. With a causal mask the last of them are the queries' own
/// tokens. A sequence without past has outputs of zero and log-sum-exps of -inf. Returns `None` if
/// no kernel supports the tensors.
///
/// # Errors
/// [`Error::Mismatch`] if a tensor does not fit `shape`, the batch or the lengths, or the mask is a
/// selection of entries.
pub fn attend_past(
    batch: &Batch,
    q: &Tensor,
    (k, v): (&Tensor, &Tensor),
    cu_seqlens_k: &[u32],
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Option<AttentionState>> {
    if let Mask::Entries(_) = mask {
        return Err(Error::mismatch("mask", "a full or a causal one", "a selection of entries"));
    }
    super::check_tokens(batch, shape.check_q(q)?)?;
    let past = shape.check_kv(k, v)?;
    let (seqs, last) = (batch.seqs().len(), cu_seqlens_k.last().map(|&last| last as usize));
    if cu_seqlens_k.len() != seqs + 1 || !cu_seqlens_k.is_sorted() || last != Some(past) {
        let expected = format!("{} increasing ends, the last of them {past}", seqs + 1);
        return Err(Error::mismatch(
            "cu_seqlens of the past",
            expected,
            format!("{cu_seqlens_k:?}"),
        ));
    }
    let Some(device) = supported_device(q, k, v, shape)? else { return Ok(None) };
    let lens = batch.cu_seqlens_on(q.device())?;
    let lens_k = Tensor::new(cu_seqlens_k, q.device())?;
    prefill::attend(device, [q, k, v], (&lens, &lens_k), shape, mask).map(Some)
}

/// Returns whether the device has kernels for keys and values of this dtype and shape. Without a
/// kernel, candle's operations are used: they are correct but slow, and a warning is logged once.
pub fn has_kernels(device: &CudaDevice, dtype: DType, shape: &AttentionShape) -> Result<bool> {
    static SAID: Once = Once::new();
    if matches!(dtype, DType::F16 | DType::BF16)
        && shape.value_dim == shape.head_dim
        && shape.window != Some(0)
        && longctx_kernels::has_prefill(device.cuda_stream().context(), shape.head_dim)?
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

/// Returns the device if it has kernels for these tensors and holds all of them.
fn supported_device<'a>(
    q: &'a Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<Option<&'a CudaDevice>> {
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let alike = v.dtype() == k.dtype() && [k, v].iter().all(|x| x.device().same_device(q.device()));
    Ok((alike && has_kernels(device, k.dtype(), shape)?).then_some(device))
}

/// Returns the view unchanged if its rows are aligned to 16 bytes, otherwise a contiguous copy.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let layout = x.layout();
    let aligned = layout.start_offset().is_multiple_of(8)
        && layout.stride()[2] == 1
        && strides(x).iter().all(|stride| *stride > 0 && stride % 8 == 0);
    Ok(if aligned { x.clone() } else { x.force_contiguous()? })
}

/// Returns the strides of tokens and heads. The stride of a dimension of size 1 is not used, so it
/// is replaced by the length of a row.
fn strides(x: &Tensor) -> [i64; 2] {
    let (dims, strides) = (x.dims(), x.stride());
    [0, 1].map(|i| if dims[i] == 1 { dims[2] } else { strides[i] } as i64)
}

//! Prefill attention (many queries per sequence): kernels/prefill.cu.

use super::{aligned, strides};
use crate::cuda::address;
use crate::{AttentionShape, AttentionState, Mask, Result};
use candle_core::{CudaDevice, DType, Tensor};
use longctx_kernels::{Half, PrefillArgs, prefill};

/// Attention of a varlen batch: q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads,
/// head_dim]`. `lens` holds the cumulative lengths of queries and keys (cu_seqlens), u32.
pub fn attend(
    device: &CudaDevice,
    [q, k, v]: [&Tensor; 3],
    (cu_seqlens_q, cu_seqlens_k): (&Tensor, &Tensor),
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<AttentionState> {
    let (q, k, v) = (aligned(&q.to_dtype(k.dtype())?)?, aligned(k)?, aligned(v)?);
    let (tokens, d) = (q.dim(0)?, shape.head_dim);
    let half = if k.dtype() == DType::BF16 { Half::BF16 } else { Half::F16 };
    // SAFETY: the kernel writes every element of both tensors.
    let empty = |dims: &[usize]| unsafe { Tensor::empty(dims, DType::F32, q.device()) };
    let (out, lse) = (empty(&[tokens, shape.heads, d])?, empty(&[tokens, shape.heads])?);
    let causal = mask == Mask::Causal;
    let ([q_token, q_head], [k_token, k_head], [v_token, v_head]) =
        (strides(&q), strides(&k), strides(&v));
    let args = PrefillArgs {
        q: address(&q)?,
        k: address(&k)?,
        v: address(&v)?,
        out: address(&out)?,
        lse: address(&lse)?,
        cu_seqlens_q: address(cu_seqlens_q)?,
        cu_seqlens_k: address(cu_seqlens_k)?,
        q_token,
        q_head,
        k_token,
        k_head,
        v_token,
        v_head,
        seqs: cu_seqlens_q.dim(0)? as i32 - 1,
        tokens: tokens as i32,
        kv_extent: k.dim(0)? as i32,
        heads: shape.heads as i32,
        kv_heads: shape.kv_heads as i32,
        causal: causal.into(),
        window: shape.window.filter(|_| causal).map_or(0, |window| window.min(1 << 30) as i32),
        scale: shape.scale,
        soft_cap: shape.soft_cap.unwrap_or(0.0),
        out_f32: 1,
        ..PrefillArgs::default()
    };
    // SAFETY: the tensors have the shapes and strides in `args`, the lengths match their tokens,
    // and the stream frees no memory before this launch has used it.
    unsafe { prefill(&device.cuda_stream(), half, d, &args) }?;
    Ok(AttentionState { out, lse })
}

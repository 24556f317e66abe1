//! Exact attention in tiles: memory linear in the length, kv heads never repeated, all cores used.
//!
//! Online softmax over blocks of entries (FlashAttention, Dao et al., arXiv 2205.14135), so that no tokens × tokens matrix exists at
//! any length. A kv head's block is widened to f32 once for its whole query group. On CPUs many query rows go through matrix
//! products, and a few through vector loops that read each key and value once; on other devices candle's operations do the work,
//! block by block, but for a few queries over f16 or bf16 on a CUDA device, which have a kernel.
//!
//! candle-nn's CPU `flash_attn` walks one query row at a time over keys in `[tokens, heads, head_dim]` order: every query
//! head reads its kv head anew, and it can neither merge with other parts nor say what was attended.

#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod gemm;
mod ops;
mod simd;
mod tile;

#[cfg(test)]
mod tests;

pub use element::{Element, with_slice};
pub use tile::{Page, attend_pages, mass_pages};

use crate::{AttentionShape, Partial, Result, Visible};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

/// Attention of queries `[batch, heads, tokens, head_dim]` over keys and values `[batch, kv_heads, entries, head_dim]`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use longctx_core::{AttentionShape, Visible, attention};
///
/// let shape = AttentionShape::new(6, 2, 64)?;
/// let q = Tensor::randn(0f32, 1., (1, 6, 10, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1., (1, 2, 10, 64), &Device::Cpu)?;
/// let causal = attention::attend(&q, &k, &k, &shape, Visible::Causal)?;
/// assert_eq!(causal.out.dims(), [1, 6, 10, 64]);
/// assert_eq!(causal.lse.dims(), [1, 6, 10]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`](crate::Error::Mismatch) if a tensor does not fit `shape`, or there are fewer entries than causal queries.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    visible: Visible,
) -> Result<Partial> {
    shape.check_kv(k, v)?;
    if !matches!(q.device(), Device::Cpu) {
        #[cfg(feature = "cuda")]
        if let Some(done) = cuda::attend(q, k, v, shape, visible)? {
            return Ok(done);
        }
        return ops::attend(q, k, v, shape, visible);
    }
    match k.dtype() {
        DType::F16 => attend_tensor::<f16>(q, k, v, shape, visible),
        DType::BF16 => attend_tensor::<bf16>(q, k, v, shape, visible),
        _ => attend_tensor::<f32>(
            q,
            &k.to_dtype(DType::F32)?,
            &v.to_dtype(DType::F32)?,
            shape,
            visible,
        ),
    }
}

/// Attention probability that each entry receives, summed over the queries: what [`KvStore::mass`](crate::KvStore::mass) promises,
/// over plain tensors.
///
/// # Errors
/// As [`attend`], and if `lse` is not `[batch, heads, tokens]`.
pub fn mass(
    q: &Tensor,
    k: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape,
    visible: Visible,
) -> Result<Vec<Vec<f32>>> {
    let cpu = |x: &Tensor| -> Result<Tensor> {
        Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?)
    };
    let keys = k.to_device(&Device::Cpu)?.contiguous()?;
    match k.dtype() {
        DType::F16 => mass_tensor::<f16>(&cpu(q)?, &keys, &cpu(lse)?, shape, visible),
        DType::BF16 => mass_tensor::<bf16>(&cpu(q)?, &keys, &cpu(lse)?, shape, visible),
        _ => mass_tensor::<f32>(&cpu(q)?, &cpu(k)?, &cpu(lse)?, shape, visible),
    }
}

fn attend_tensor<T: Element>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    visible: Visible,
) -> Result<Partial> {
    let (k, v) = (k.contiguous()?, v.contiguous()?);
    let rows = k.dim(2)? * shape.head_dim;
    element::with_slice::<T, _>(&k, |k| {
        element::with_slice::<T, _>(&v, |v| {
            let heads: Vec<_> = split(k, rows)
                .zip(split(v, rows))
                .map(|(keys, values)| vec![Page { keys, values }])
                .collect();
            attend_pages(q, &heads, shape, visible)
        })
    })
}

fn mass_tensor<T: Element>(
    q: &Tensor,
    k: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape,
    visible: Visible,
) -> Result<Vec<Vec<f32>>> {
    let rows = k.dim(2)? * shape.head_dim;
    element::with_slice::<T, _>(k, |k| {
        let heads: Vec<_> = split(k, rows).map(|keys| vec![Page { keys, values: keys }]).collect();
        mass_pages(q, lse, &heads, shape, visible)
    })
}

/// The parts of each batch entry and head.
fn split<T>(data: &[T], size: usize) -> impl Iterator<Item = &[T]> {
    data.chunks_exact(size.max(1))
}

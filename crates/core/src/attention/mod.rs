//! Exact attention in tiles. Memory grows linearly with the length, kv heads are not repeated, and
//! all cores are used.
//!
//! The algorithm is the online softmax over blocks of entries (FlashAttention, Dao et al., arXiv
//! 2205.14135), so no tokens × tokens matrix exists at any length. A block of a kv head is widened
//! to f32 once for its whole group of query heads.
//!
//! | tensors | implementation |
//! |---|---|
//! | CPU, many query rows | matrix products |
//! | CPU, few query rows | vector loops that read each key and value once |
//! | CUDA, f16 and bf16 | fused kernels |
//! | other devices and dtypes | candle's operations, block by block |
//!
//! candle-nn's CPU `flash_attn` processes one query row at a time over keys in `[tokens, heads,
//! head_dim]` order: every query head reads its kv head again. It returns neither a log-sum-exp to
//! merge with other parts nor attention probabilities.

#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod ops;
pub(crate) mod simd;
mod tile;

#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub use cuda::attend_past;
#[cfg(feature = "cuda")]
pub(crate) use cuda::{has_kernels, sums_on_device};
pub use element::{Element, with_slice};
pub use tile::{Page, attend_pages, attention_sums_pages};

use crate::{AttentionShape, AttentionState, AttentionSums, Batch, Error, Mask, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

/// Causal attention of each sequence's queries `[tokens, heads, head_dim]` over the keys
/// `[tokens, kv_heads, head_dim]` and values `[tokens, kv_heads, value_dim]` of the same tokens.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use longctx_core::{AttentionShape, Batch, attention};
///
/// let shape = AttentionShape::new(6, 2, 64)?;
/// let batch = Batch::new(&[(0, 7), (1, 3)])?;
/// let q = Tensor::randn(0f32, 1., (10, 6, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1., (10, 2, 64), &Device::Cpu)?;
/// let causal = attention::attend(&batch, &q, &k, &k, &shape)?;
/// assert_eq!(causal.out.dims(), [10, 6, 64]);
/// assert_eq!(causal.lse.dims(), [10, 6]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] if a tensor does not fit `shape` or the batch; [`Error::Setting`] for an
/// invalid shape.
pub fn attend(
    batch: &Batch,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<AttentionState> {
    shape.check()?;
    check_tokens(batch, shape.check_q(q)?)?;
    check_tokens(batch, shape.check_kv(k, v)?)?;
    #[cfg(feature = "cuda")]
    if let Some(state) = cuda::attend_batch(batch, q, k, v, shape)? {
        return Ok(state);
    }
    if !matches!(q.device(), Device::Cpu) {
        // Matrix products need rows without gaps.
        let by_head = |x: &Tensor| x.transpose(0, 1)?.contiguous();
        let (k, v) = (by_head(k)?, by_head(v)?);
        let kv = |i: usize| {
            let tokens = &batch.cu_seqlens()[i..i + 2];
            let of = |x: &Tensor| x.narrow(1, tokens[0], tokens[1] - tokens[0])?.unsqueeze(0);
            Ok((of(&k)?, of(&v)?))
        };
        return attend_each(batch, q, shape, Mask::Causal, kv);
    }
    match k.dtype() {
        DType::F16 => attend_tensors::<f16>(batch, q, k, v, shape),
        DType::BF16 => attend_tensors::<bf16>(batch, q, k, v, shape),
        _ => {
            let f32 = |x: &Tensor| x.to_dtype(DType::F32);
            attend_tensors::<f32>(batch, q, &f32(k)?, &f32(v)?, shape)
        }
    }
}

/// Returns the attention probability that each token receives from the queries of its own sequence,
/// summed over these queries: [`KvStore::attention_sums`](crate::KvStore::attention_sums) over the
/// tokens of one call. `queries` are the last tokens of each sequence; `q` and `lse` have one row
/// for each of them. On a CUDA device without a kernel for the dtype and shape, keys and queries
/// are copied to the CPU and the sums are copied back.
///
/// # Errors
/// As [`attend`], and if `lse` is not `[queries, heads]`.
pub fn attention_sums(
    batch: &Batch,
    k: &Tensor,
    queries: &Batch,
    q: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape,
) -> Result<Vec<AttentionSums>> {
    let tokens = k.dim(0)?;
    check_tokens(batch, tokens)?;
    if batch.seqs() != queries.seqs() {
        let got = format!("{:?}", queries.seqs());
        return Err(Error::mismatch(
            "sequences of the queries",
            format!("{:?}", batch.seqs()),
            got,
        ));
    }
    #[cfg(feature = "cuda")]
    if let Some(sums) = cuda::sums_of_call(batch, k, queries, q, lse, shape)? {
        return Ok(sums);
    }
    let device = k.device();
    let cpu = |x: &Tensor| -> Result<Tensor> { Ok(x.to_device(&Device::Cpu)?) };
    let (q, lse, k) = (cpu(q)?, cpu(lse)?, cpu(k)?);
    // The sums do not depend on values, so the keys are passed as values.
    let shape = AttentionShape { value_dim: shape.head_dim, ..*shape };
    let sums = match k.dtype() {
        DType::F16 => sums_of_tensor::<f16>(batch, &k, queries, &q, &lse, &shape),
        DType::BF16 => sums_of_tensor::<bf16>(batch, &k, queries, &q, &lse, &shape),
        _ => sums_of_tensor::<f32>(batch, &k.to_dtype(DType::F32)?, queries, &q, &lse, &shape),
    };
    by_sequence(&sums?, &shape, device)
}

/// Regroups a list per query head as the sums of each sequence.
pub(crate) fn by_sequence(
    sums: &[Vec<f32>],
    shape: &AttentionShape,
    device: &Device,
) -> Result<Vec<AttentionSums>> {
    let of_seq = |lists| AttentionSums::from_lists(lists, shape.heads_per_kv(), device);
    sums.chunks(shape.heads).map(of_seq).collect()
}

/// Attention one sequence at a time, on a device other than the CPU. `kv` returns the keys and
/// values of the i-th sequence, `[1, kv_heads, entries, channels]`.
pub(crate) fn attend_each(
    batch: &Batch,
    q: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
    kv: impl Fn(usize) -> Result<(Tensor, Tensor)>,
) -> Result<AttentionState> {
    let mut parts = (Vec::new(), Vec::new());
    for (i, (_, tokens)) in batch.iter().enumerate() {
        let q = q.narrow(0, tokens.start, tokens.len())?;
        let (k, v) = kv(i)?;
        let state = attend_one(&q, &k, &v, shape, mask)?;
        parts.0.push(state.out);
        parts.1.push(state.lse);
    }
    Ok(AttentionState { out: Tensor::cat(&parts.0, 0)?, lse: Tensor::cat(&parts.1, 0)? })
}

/// Attention of one sequence: q `[tokens, heads, head_dim]`, keys and values `[1, kv_heads,
/// entries, channels]`.
fn attend_one(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<AttentionState> {
    let (out, lse) = ops::attend(&q.transpose(0, 1)?.unsqueeze(0)?, k, v, shape, mask)?;
    let by_token = |x: Tensor| x.squeeze(0)?.transpose(0, 1);
    Ok(AttentionState { out: by_token(out)?, lse: by_token(lse)? })
}

fn check_tokens(batch: &Batch, tokens: usize) -> Result<()> {
    if tokens != batch.tokens() {
        return Err(Error::mismatch("tokens", format!("the batch's {}", batch.tokens()), tokens));
    }
    Ok(())
}

/// Returns the rows of each sequence and kv head, `[sequences * kv_heads]` slices, of `x`
/// `[kv_heads, tokens, channels]`.
fn split_heads<'a, T>(batch: &Batch, x: &'a [T], kv_heads: usize, d: usize) -> Vec<&'a [T]> {
    let head = batch.tokens() * d;
    let of_seq = |tokens: std::ops::Range<usize>| {
        (0..kv_heads).map(move |h| &x[h * head + tokens.start * d..h * head + tokens.end * d])
    };
    batch.iter().flat_map(|(_, tokens)| of_seq(tokens)).collect()
}

fn attend_tensors<T: Element>(
    batch: &Batch,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<AttentionState> {
    let by_head = |x: &Tensor| x.transpose(0, 1)?.contiguous();
    element::with_slice::<T, _>(&by_head(k)?, |k| {
        element::with_slice::<T, _>(&by_head(v)?, |v| {
            let keys = split_heads(batch, k, shape.kv_heads, shape.head_dim);
            let values = split_heads(batch, v, shape.kv_heads, shape.value_dim);
            let heads: Vec<_> = keys
                .into_iter()
                .zip(values)
                .map(|(keys, values)| vec![Page { keys, values }])
                .collect();
            attend_pages(batch, q, &heads, shape, Mask::Causal)
        })
    })
}

fn sums_of_tensor<T: Element>(
    batch: &Batch,
    k: &Tensor,
    queries: &Batch,
    q: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape,
) -> Result<Vec<Vec<f32>>> {
    element::with_slice::<T, _>(&k.transpose(0, 1)?.contiguous()?, |k| {
        let heads: Vec<_> = split_heads(batch, k, shape.kv_heads, shape.head_dim)
            .into_iter()
            .map(|keys| vec![Page { keys, values: keys }])
            .collect();
        attention_sums_pages(queries, q, lse, &heads, shape, Mask::Causal)
    })
}

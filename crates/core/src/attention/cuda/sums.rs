//! Attention probabilities accumulated per entry: kernels/paged/sums.cuh.

use crate::cuda::address;
use crate::{AttentionShape, AttentionSums, Batch, Error, Mask, Result};
use candle_core::{CudaDevice, DType, Tensor};
use longctx_cuda::upload;
use longctx_kernels::{Half, paged};

/// Returns the attention probability that each entry of each work item receives. There is a work
/// item for each kv head of each sequence. `q` is contiguous and has the dtype of the keys.
pub fn sums_on_device(
    device: &CudaDevice,
    mut work: Vec<paged::SumsWork>,
    q: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Vec<AttentionSums>> {
    let (stream, group) = (device.cuda_stream(), shape.heads_per_kv());
    if lse.dims() != [q.dim(0)?, shape.heads] {
        let expected = format!("[{}, {}]", q.dim(0)?, shape.heads);
        return Err(Error::mismatch("lse", expected, format!("{:?}", lse.dims())));
    }
    let lse = lse.to_device(q.device())?.to_dtype(DType::F32)?.contiguous()?;
    let mut total = 0;
    for of in &mut work {
        of.out = total as i64;
        total += group * of.len as usize;
    }
    // SAFETY: the kernel writes an element for every entry of every head.
    let out = unsafe { Tensor::empty(total.max(1), DType::F32, q.device()) }?;
    let most = |of: fn(&paged::SumsWork) -> i32| work.iter().map(of).max().unwrap_or(0) as usize;
    let on_device = upload(&stream, &work)?;
    let causal = mask == Mask::Causal;
    let args = paged::SumsArgs {
        q: address(q)?,
        lse: address(&lse)?,
        out: address(&out)?,
        work: on_device.address(),
        heads: shape.heads as i32,
        heads_per_kv: group as i32,
        causal: causal.into(),
        window: shape.window.filter(|_| causal).map_or(0, |window| window.min(1 << 30) as i32),
        scale: shape.scale,
        soft_cap: shape.soft_cap.unwrap_or(0.0),
    };
    let half = if q.dtype() == DType::BF16 { Half::BF16 } else { Half::F16 };
    let sizes = (work.len(), most(|of| of.len), most(|of| of.queries));
    // SAFETY: the keys have as many rows as the work items say, the output has room for all sums,
    // and the stream frees no memory before the launch has used it.
    unsafe { paged::sums(&stream, half, shape.head_dim, &args, sizes) }?;
    let of_seq = |heads: &[paged::SumsWork]| {
        let lens: Vec<_> = heads.iter().map(|work| work.len as usize).collect();
        let count = group * lens.iter().sum::<usize>();
        AttentionSums::new(out.narrow(0, heads[0].out as usize, count)?, group, lens)
    };
    work.chunks(shape.kv_heads).map(of_seq).collect()
}

/// Returns the attention probability that each token of one call receives, with keys `[tokens,
/// kv_heads, head_dim]`; `None` if no kernel supports the tensors.
pub fn sums_of_call(
    batch: &Batch,
    k: &Tensor,
    queries: &Batch,
    q: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape,
) -> Result<Option<Vec<AttentionSums>>> {
    let Some(device) = super::supported_device(q, k, k, shape)? else { return Ok(None) };
    let k = super::aligned(k)?;
    let q = q.to_dtype(k.dtype())?.contiguous()?;
    let [token, head] = super::strides(&k);
    let start = address(&k)?;
    let mut work = Vec::new();
    for ((_, tokens), (_, own)) in batch.iter().zip(queries.iter()) {
        for kv_head in 0..shape.kv_heads {
            work.push(paged::SumsWork {
                keys: start + 2 * (tokens.start as i64 * token + kv_head as i64 * head) as u64,
                stride: token,
                len: tokens.len() as i32,
                kv_head: kv_head as i32,
                queries: own.len() as i32,
                first_token: own.start as i32,
                ..Default::default()
            });
        }
    }
    sums_on_device(device, work, &q, lse, shape, Mask::Causal).map(Some)
}

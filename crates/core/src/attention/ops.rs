//! Attention by candle's own operations, a block of queries at a time: for devices without a kernel of ours, and the plain
//! path that the kernels are tested against.

use super::super::{AttentionShape, Error, Partial, Result, Visible};
use candle_core::{D, DType, Tensor};

/// Queries of a block: scores of `heads x QUERIES x entries` exist at a time.
const QUERIES: usize = 128;

/// The most that a row's unnormalised weights may add up to: in f16, values of up to 1,000 then sum up without overflow, and even weights of
/// 100,000 entries are normal numbers.
const SUM: f64 = 64.0;

/// As [`attend`](super::attend), on any device. Queries and keys both in f16 are multiplied as they are (scores then carry f16's
/// relative error, as in every implementation on plain matrix products), others in f32.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    visible: Visible,
) -> Result<Partial> {
    let (batch, tokens) = shape.check_q(q)?;
    let (kv_batch, len) = shape.check_kv(k, v)?;
    if kv_batch != batch {
        return Err(Error::mismatch("batch of k and v", batch, kv_batch));
    }
    if visible == Visible::Causal && len < tokens {
        let expected = format!("at least the {tokens} of the queries' own tokens");
        return Err(Error::mismatch("entries of a kv head", expected, len));
    }
    if len == 0 {
        return Ok(Partial {
            out: q.to_dtype(DType::F32)?.zeros_like()?,
            lse: Tensor::full(f32::NEG_INFINITY, (batch, shape.heads, tokens), q.device())?,
        });
    }
    let dtype = match (q.dtype(), k.dtype()) {
        (DType::F16, DType::F16) => DType::F16,
        _ => DType::F32,
    };
    let (keys, v) = (k.to_dtype(dtype)?.transpose(2, 3)?, v.to_dtype(dtype)?);
    let mut parts = (Vec::new(), Vec::new());
    for start in (0..tokens).step_by(QUERIES) {
        let count = QUERIES.min(tokens - start);
        let block = q.narrow(2, start, count)?.to_dtype(dtype)?;
        let mask = mask(start..start + count, tokens, len, shape, visible, q)?;
        let (out, lse) = attend_block(&block, &keys, &v, shape, mask.as_ref())?;
        parts.0.push(out);
        parts.1.push(lse);
    }
    Ok(Partial { out: Tensor::cat(&parts.0, 2)?, lse: Tensor::cat(&parts.1, 2)? })
}

/// The group's query heads become rows of their kv head, so that no kv head is repeated.
fn attend_block(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    shape: &AttentionShape,
    mask: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (batch, heads, count, d) = q.dims4()?;
    let (kv_heads, group, len) = (shape.kv_heads, shape.group(), values.dim(2)?);
    let q =
        (q.contiguous()?.reshape((batch, kv_heads, group * count, d))? * f64::from(shape.scale))?;
    let mut scores = q.matmul(keys)?.to_dtype(DType::F32)?;
    if let Some(cap) = shape.soft_cap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    if let Some(mask) = mask {
        scores = scores
            .reshape((batch, kv_heads, group, count, len))?
            .broadcast_add(mask)?
            .reshape((batch, kv_heads, group * count, len))?;
    }
    // A row that sees nothing has -inf throughout: a finite maximum keeps it at zero instead of NaN.
    let max = scores.max_keepdim(D::Minus1)?.maximum(f32::MIN)?;
    let weights = scores.broadcast_sub(&max)?.exp()?;
    let sum = weights.sum_keepdim(D::Minus1)?;
    let shrink = (&sum / SUM)?.maximum(1f32)?;
    let weights = weights.broadcast_div(&shrink)?.to_dtype(values.dtype())?;
    let out = weights.matmul(values)?.to_dtype(DType::F32)?;
    let out = out.broadcast_mul(&(shrink / sum.maximum(f32::MIN_POSITIVE)?)?)?;
    let lse = (max + sum.log()?)?;
    Ok((out.reshape((batch, heads, count, d))?, lse.reshape((batch, heads, count))?))
}

/// `[count, len]`: 0 where a query sees an entry, -inf elsewhere; `None` if every query sees every entry.
fn mask(
    queries: std::ops::Range<usize>,
    tokens: usize,
    len: usize,
    shape: &AttentionShape,
    visible: Visible,
    like: &Tensor,
) -> Result<Option<Tensor>> {
    let ranges: Vec<_> =
        queries.clone().map(|i| visible.range(i, tokens, len, shape.window)).collect();
    if ranges.iter().all(|r| *r == (0..len)) {
        return Ok(None);
    }
    let row = |seen: std::ops::Range<usize>| {
        (0..len).map(move |j| if seen.contains(&j) { 0.0 } else { f32::NEG_INFINITY })
    };
    let data: Vec<f32> = ranges.into_iter().flat_map(row).collect();
    Ok(Some(Tensor::from_vec(data, (queries.len(), len), like.device())?))
}

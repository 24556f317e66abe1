//! Attention by candle's own operations, one block of queries at a time. Devices without a kernel
//! use it, and the kernels are tested against it. Entries that no query of a block sees are
//! skipped. Only the two edges of the remaining range need a mask.

use crate::{AttentionShape, Error, Mask, Result};
use candle_core::{D, DType, Device, Tensor};
use std::ops::Range;

/// Queries per block. `heads x QUERIES x entries` scores exist at a time.
const QUERIES: usize = 128;

/// Upper bound of the sum of a row's unnormalised weights. In f16, values of up to 1,000 then sum
/// without overflow, and the weights of 100,000 entries are still normal numbers.
const SUM: f64 = 64.0;

/// Attention of one sequence on any device: q `[1, heads, tokens, head_dim]`, keys and values `[1,
/// kv_heads, entries, channels]`. Returns the output `[1, heads, tokens, value_dim]` and the
/// log-sum-exp `[1, heads, tokens]`. If queries and keys are both f16 they are multiplied in f16,
/// so scores have f16's relative error, as in every implementation on plain matrix products. Other
/// dtypes are multiplied in f32.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<(Tensor, Tensor)> {
    let (tokens, len) = (q.dim(2)?, k.dim(2)?);
    if mask == Mask::Causal && len < tokens {
        let expected = format!("at least the {tokens} of the queries' own tokens");
        return Err(Error::mismatch("entries of a kv head", expected, len));
    }
    if len == 0 {
        let out = (1, shape.heads, tokens, shape.value_dim);
        let lse = Tensor::full(f32::NEG_INFINITY, (1, shape.heads, tokens), q.device())?;
        return Ok((Tensor::zeros(out, DType::F32, q.device())?, lse));
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
        let seen: Vec<_> =
            (start..start + count).map(|i| mask.range(i, tokens, len, shape.window)).collect();
        // Both ends of the visible range increase from query to query.
        let (first, last) = (seen[0].start, seen[count - 1].end);
        let keys = keys.narrow(3, first, last - first)?;
        let values = v.narrow(2, first, last - first)?;
        let (out, lse) = attend_block(&block, &keys, &values, shape, &seen)?;
        parts.0.push(out);
        parts.1.push(lse);
    }
    Ok((Tensor::cat(&parts.0, 2)?, Tensor::cat(&parts.1, 2)?))
}

/// The query heads of a group become rows of their kv head, so that no kv head is repeated. `seen`
/// holds the range of entries that each query sees; keys and values cover the union of these
/// ranges.
fn attend_block(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    shape: &AttentionShape,
    seen: &[Range<usize>],
) -> Result<(Tensor, Tensor)> {
    let (batch, heads, count, d) = q.dims4()?;
    let (kv_heads, group) = (shape.kv_heads, shape.heads_per_kv());
    let q =
        (q.contiguous()?.reshape((batch, kv_heads, group * count, d))? * f64::from(shape.scale))?;
    let mut scores = q.matmul(keys)?.to_dtype(DType::F32)?.contiguous()?;
    if let Some(cap) = shape.soft_cap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    mask_scores(&scores, group, seen)?;
    // A row that sees nothing has -inf everywhere: a finite maximum gives zero instead of NaN.
    let max = scores.max_keepdim(D::Minus1)?.maximum(f32::MIN)?;
    let weights = scores.broadcast_sub(&max)?.exp()?;
    let sum = weights.sum_keepdim(D::Minus1)?;
    let shrink = (&sum / SUM)?.maximum(1f32)?;
    let weights = weights.broadcast_div(&shrink)?.to_dtype(values.dtype())?;
    let out = weights.matmul(values)?.to_dtype(DType::F32)?;
    let out = out.broadcast_mul(&(shrink / sum.maximum(f32::MIN_POSITIVE)?)?)?;
    let lse = (max + sum.log()?)?;
    Ok((out.reshape((batch, heads, count, shape.value_dim))?, lse.reshape((batch, heads, count))?))
}

/// Sets scores `[batch, kv_heads, group * queries, entries]` to -inf where a query does not see an
/// entry. The tensor is contiguous and not shared.
fn mask_scores(scores: &Tensor, group: usize, seen: &[Range<usize>]) -> Result<()> {
    let (batch, kv_heads, rows, _) = scores.dims4()?;
    let (first, last) = (&seen[0], &seen[seen.len() - 1]);
    // Only the two edges need a mask: every query sees the entries between them.
    let edges = match last.start < first.end {
        true => [first.start..last.start, first.end..last.end],
        false => [first.start..last.end, 0..0],
    };
    for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
        let (at, len) = (edge.start - first.start, edge.len());
        let by_query =
            scores.narrow(3, at, len)?.reshape((batch, kv_heads, group, seen.len(), len))?;
        let masked = by_query.broadcast_add(&mask(seen, edge, scores.device())?)?;
        scores.slice_set(&masked.reshape((batch, kv_heads, rows, len))?, 3, at)?;
    }
    Ok(())
}

/// Returns a mask `[queries, entries]`: 0 where a query sees an entry, -inf elsewhere.
fn mask(seen: &[Range<usize>], entries: Range<usize>, device: &Device) -> Result<Tensor> {
    let row = |seen: &Range<usize>| {
        let seen = seen.clone();
        entries.clone().map(move |j| if seen.contains(&j) { 0.0 } else { f32::NEG_INFINITY })
    };
    let data: Vec<f32> = seen.iter().flat_map(row).collect();
    Ok(Tensor::from_vec(data, (seen.len(), entries.len()), device)?)
}

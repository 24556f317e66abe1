//! A pool on the CPU behind tensors: its arguments are slices of known sequences.

use std::ops::Range;

use super::QuantStore;
use crate::{AttentionOutput, Mask, Pool, Queries};
use candle_core::{DType, Device, Tensor};
use longctx_core::attention::with_slice;
use longctx_core::{
    AttentionShape, AttentionState, AttentionSums, Batch, Error, Result, Selection, SeqId,
};

impl QuantStore {
    /// Returns the queries in f32, checked against a batch.
    fn queries(&self, batch: &Batch, q: &Tensor) -> Result<Tensor> {
        let tokens = self.shape.check_q(q)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of q", batch.tokens(), tokens));
        }
        check_on_cpu(q)?;
        Ok(q.to_dtype(DType::F32)?.contiguous()?)
    }

    /// Runs `f` with the queries of the batch's known sequences, and with their sequence ids,
    /// `cu_seqlens` and mask. Returns `None` if no sequence is known.
    fn with_known<R>(
        &self,
        pool: &Pool,
        batch: &Batch,
        q: &Tensor,
        mask: longctx_core::Mask<'_>,
        f: impl FnOnce(Queries<'_>, &KnownSequences, Mask<'_>) -> Result<R>,
    ) -> Result<Option<R>> {
        let q = self.queries(batch, q)?;
        let AttentionShape { kv_heads, heads, scale, soft_cap, window, .. } = self.shape;
        let known = KnownSequences::of(batch, |seq| pool.lens(seq).is_some());
        let lists: Vec<Vec<Range<usize>>> = match mask {
            longctx_core::Mask::Entries(ranges) => {
                let lens = |&seq: &SeqId| pool.lens(seq).unwrap_or(vec![0; kv_heads]);
                ranges.check(&batch.seqs().iter().flat_map(lens).collect::<Vec<_>>())?;
                let of = |&i: &usize| &ranges.heads()[i * kv_heads..(i + 1) * kv_heads];
                known.indices.iter().flat_map(of).cloned().collect()
            }
            _ => Vec::new(),
        };
        let mask = match mask {
            longctx_core::Mask::Full => Mask::Full,
            longctx_core::Mask::Causal => Mask::Causal,
            longctx_core::Mask::Entries(_) => Mask::Entries(&lists),
        };
        if known.seqs.is_empty() {
            return match mask {
                Mask::Causal => {
                    let (what, expected) = (
                        format!("entries of sequence {}", batch.seqs()[0]),
                        "those of its queries",
                    );
                    Err(Error::mismatch(what, expected, "none"))
                }
                _ => Ok(None),
            };
        }
        with_slice::<f32, _>(&q, |data| {
            let row = heads * self.shape.head_dim;
            let data = known.rows(data, row);
            let queries = Queries { data: &data, heads, scale, soft_cap, window };
            f(queries, &known, mask)
        })
        .map(Some)
    }

    /// Returns keys `[entries, head_dim]` and values `[entries, value_dim]` on the CPU.
    pub(super) fn rows(&self, (keys, values): (Vec<f32>, Vec<f32>)) -> Result<(Tensor, Tensor)> {
        let of = |x: Vec<f32>, d: usize| {
            let dims = (x.len() / d, d);
            Tensor::from_vec(x, dims, &Device::Cpu)
        };
        Ok((of(keys, self.shape.head_dim)?, of(values, self.shape.value_dim)?))
    }

    pub(super) fn attend_on_host(
        &self,
        pool: &Pool,
        batch: &Batch,
        q: &Tensor,
        mask: longctx_core::Mask<'_>,
    ) -> Result<AttentionState> {
        let (tokens, heads, dv) = (batch.tokens(), self.shape.heads, self.shape.value_dim);
        let done = self.with_known(pool, batch, q, mask, |queries, known, mask| {
            let AttentionOutput { out, lse } =
                pool.attend(&queries, &known.seqs, &known.cu_seqlens, mask)?;
            let out = known.scatter(out, heads * dv, tokens, 0.0);
            Ok((out, known.scatter(lse, heads, tokens, f32::NEG_INFINITY)))
        })?;
        let nothing = || (vec![0.0; tokens * heads * dv], vec![f32::NEG_INFINITY; tokens * heads]);
        let (out, lse) = done.unwrap_or_else(nothing);
        Ok(AttentionState {
            out: Tensor::from_vec(out, (tokens, heads, dv), &Device::Cpu)?,
            lse: Tensor::from_vec(lse, (tokens, heads), &Device::Cpu)?,
        })
    }

    pub(super) fn sums_on_host(
        &self,
        pool: &Pool,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: longctx_core::Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        let heads = self.shape.heads;
        let expected = [batch.tokens(), heads];
        if lse.dims() != expected {
            let got = format!("{:?}", lse.dims());
            return Err(Error::mismatch("lse", format!("{expected:?}"), got));
        }
        let lse = lse.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut all = vec![Vec::new(); batch.seqs().len() * heads];
        self.with_known(pool, batch, q, mask, |queries, known, mask| {
            let lse = known.rows(&lse, heads);
            let sums = pool.attention_sums(&queries, &lse, &known.seqs, &known.cu_seqlens, mask)?;
            let indices = known.indices.iter().flat_map(|i| i * heads..(i + 1) * heads);
            indices.zip(sums).for_each(|(index, sums)| all[index] = sums);
            Ok(())
        })?;
        let of_seq =
            |lists| AttentionSums::from_lists(lists, self.shape.heads_per_kv(), &Device::Cpu);
        all.chunks(heads).map(of_seq).collect()
    }
}

/// Returns the selected entries as one list per kv head of each sequence.
pub(super) fn lists(batch: &Batch, tokens: &[Selection], kv_heads: usize) -> Result<Vec<Vec<u32>>> {
    let mut lists = Vec::new();
    for ((_, own), selection) in batch.iter().zip(tokens) {
        lists.extend_from_slice(selection.check(&vec![own.len(); kv_heads])?);
    }
    Ok(lists)
}

/// Returns keys and values as contiguous tensors of one float dtype, checked against a batch.
pub(super) fn prepare(
    shape: &AttentionShape,
    batch: &Batch,
    k: &Tensor,
    v: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let tokens = shape.check_kv(k, v)?;
    if tokens != batch.tokens() {
        return Err(Error::mismatch("tokens of k", batch.tokens(), tokens));
    }
    let dtype = match k.dtype() {
        dtype @ (DType::F16 | DType::BF16) => dtype,
        _ => DType::F32,
    };
    let fit = |x: &Tensor| -> Result<Tensor> {
        check_on_cpu(x)?;
        Ok(x.to_dtype(dtype)?.contiguous()?)
    };
    Ok((fit(k)?, fit(v)?))
}

fn check_on_cpu(x: &Tensor) -> Result<()> {
    match x.device().is_cpu() {
        true => Ok(()),
        false => {
            let got = format!("one on {:?}", x.device().location());
            Err(Error::mismatch("tensor", "one on the CPU, as the store", got))
        }
    }
}

/// The known sequences of a batch.
struct KnownSequences {
    seqs: Vec<SeqId>,
    cu_seqlens: Vec<usize>,
    /// Indices of the sequences in the batch.
    indices: Vec<usize>,
    /// Their token ranges in the batch.
    tokens: Vec<Range<usize>>,
    /// Whether all sequences are known.
    all: bool,
}

impl KnownSequences {
    fn of(batch: &Batch, known: impl Fn(SeqId) -> bool) -> Self {
        let mut of = Self {
            seqs: Vec::new(),
            cu_seqlens: vec![0],
            indices: Vec::new(),
            tokens: Vec::new(),
            all: true,
        };
        for (index, (seq, tokens)) in batch.iter().enumerate() {
            if !known(seq) {
                of.all = false;
                continue;
            }
            of.seqs.push(seq);
            of.cu_seqlens.push(of.cu_seqlens[of.cu_seqlens.len() - 1] + tokens.len());
            of.indices.push(index);
            of.tokens.push(tokens);
        }
        of
    }

    /// Returns their rows of a batch's rows.
    fn rows<'a>(&self, data: &'a [f32], row: usize) -> std::borrow::Cow<'a, [f32]> {
        if self.all {
            return data.into();
        }
        let of = |tokens: &Range<usize>| &data[tokens.start * row..tokens.end * row];
        self.tokens.iter().flat_map(of).copied().collect::<Vec<_>>().into()
    }

    /// Scatters their rows among the batch's; the other rows are filled with `fill`.
    fn scatter(&self, data: Vec<f32>, row: usize, tokens: usize, fill: f32) -> Vec<f32> {
        if self.all {
            return data;
        }
        let mut all = vec![fill; tokens * row];
        let mut from = data.as_slice();
        for tokens in &self.tokens {
            let (own, rest) = from.split_at(tokens.len() * row);
            all[tokens.start * row..tokens.end * row].copy_from_slice(own);
            from = rest;
        }
        all
    }
}

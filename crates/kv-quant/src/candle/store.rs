use std::ops::Range;
use std::sync::Arc;

use crate::{Attended, Format, Mask, Pool, PoolBytes, PoolShape, Queries, Rotary};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use longctx_core::attention::with_slice;
use longctx_core::{
    AttentionShape, AttentionState, Batch, Error, Footprint, KvStore, Result, Selection, SeqId,
    check_selections,
};

/// Packed keys and values of one layer for many sequences: a [`Pool`] behind longctx-core's
/// [`KvStore`]. Attention reads the codes as they lie.
///
/// Tensors are on the CPU.
#[derive(Debug, Clone)]
pub struct QuantStore {
    shape: AttentionShape,
    pool: Pool,
}

/// Runs an expression on the numbers of a contiguous tensor, whatever float type they have.
macro_rules! with_numbers {
    ($tensor:expr, $numbers:ident => $run:expr) => {
        match $tensor.dtype() {
            DType::F16 => with_slice::<f16, _>($tensor, |$numbers| $run),
            DType::BF16 => with_slice::<bf16, _>($tensor, |$numbers| $run),
            _ => with_slice::<f32, _>($tensor, |$numbers| $run),
        }
    };
}

impl QuantStore {
    /// An empty store.
    ///
    /// # Errors
    /// [`Error::Setting`] if the format does not fit the heads, or has keys
    /// [before RoPE](crate::KeyBasis::BeforeRope).
    pub fn new(shape: AttentionShape, format: Format) -> Result<Self> {
        Ok(Self { shape, pool: Pool::new(pool_shape(&shape), format)? })
    }

    /// An empty store whose keys come as they are before the rotary embedding; its queries come
    /// rotated.
    ///
    /// # Errors
    /// [`Error::Setting`] if the format or the embedding does not fit the heads.
    pub fn before_rope(shape: AttentionShape, format: Format, rotary: Arc<Rotary>) -> Result<Self> {
        Ok(Self { shape, pool: Pool::before_rope(pool_shape(&shape), format, rotary)? })
    }

    /// The same with at most `bytes` bytes of blocks and pages in use.
    #[must_use]
    pub fn with_capacity(self, bytes: usize) -> Self {
        Self { pool: self.pool.with_capacity(bytes), ..self }
    }

    /// How keys and values are held.
    pub fn format(&self) -> Format {
        self.pool.format()
    }

    /// The packed keys and values.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The packed keys and values, for those who load sequences into them.
    #[cfg(feature = "save")]
    pub(super) fn pool_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Checks that there is room for a batch's tokens.
    pub(super) fn check_append(&self, batch: &Batch) -> Result<()> {
        Ok(self.pool.check_append(batch.seqs(), batch.cu_seqlens())?)
    }

    /// Keys and values as contiguous tensors of one float type, checked against a batch.
    fn prepare(&self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let tokens = self.shape.check_kv(k, v)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of k", batch.tokens(), tokens));
        }
        let dtype = match k.dtype() {
            dtype @ (DType::F16 | DType::BF16) => dtype,
            _ => DType::F32,
        };
        let fit = |x: &Tensor| -> Result<Tensor> {
            on_cpu(x)?;
            Ok(x.to_dtype(dtype)?.contiguous()?)
        };
        Ok((fit(k)?, fit(v)?))
    }

    /// The queries in f32, checked against a batch.
    fn queries(&self, batch: &Batch, q: &Tensor) -> Result<Tensor> {
        let tokens = self.shape.check_q(q)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of q", batch.tokens(), tokens));
        }
        on_cpu(q)?;
        Ok(q.to_dtype(DType::F32)?.contiguous()?)
    }

    /// Runs `f` with the queries of the batch's sequences that are known: sequences, `cu_seqlens`
    /// and mask are theirs alone. `None` if there are none.
    fn of_known<R>(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: longctx_core::Mask<'_>,
        f: impl FnOnce(Queries<'_>, &Known, Mask<'_>) -> Result<R>,
    ) -> Result<Option<R>> {
        let q = self.queries(batch, q)?;
        let AttentionShape { kv_heads, heads, scale, soft_cap, window, .. } = self.shape;
        let known = Known::of(batch, |seq| self.pool.lens(seq).is_some());
        let lists: Vec<Vec<Range<usize>>> = match mask {
            longctx_core::Mask::Entries(ranges) => {
                let lens = |&seq: &SeqId| self.pool.lens(seq).unwrap_or(vec![0; kv_heads]);
                ranges.check(&batch.seqs().iter().flat_map(lens).collect::<Vec<_>>())?;
                let of = |&i: &usize| &ranges.heads()[i * kv_heads..(i + 1) * kv_heads];
                known.places.iter().flat_map(of).cloned().collect()
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
                    let seq = batch.seqs()[0];
                    Err(Error::mismatch(format!("entries of sequence {seq}"), "its own", "none"))
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
}

fn pool_shape(shape: &AttentionShape) -> PoolShape {
    let AttentionShape { kv_heads, head_dim, value_dim, .. } = *shape;
    PoolShape { kv_heads, head_dim, value_dim }
}

fn on_cpu(x: &Tensor) -> Result<()> {
    match x.device().is_cpu() {
        true => Ok(()),
        false => {
            let what = format!("a packed store on {:?}", x.device().location());
            Err(Error::Unsupported(what))
        }
    }
}

/// The sequences of a batch that a store knows.
struct Known {
    seqs: Vec<SeqId>,
    cu_seqlens: Vec<usize>,
    /// Which of the batch's sequences they are.
    places: Vec<usize>,
    /// Their tokens in the batch.
    tokens: Vec<Range<usize>>,
    /// Whether all are known.
    all: bool,
}

impl Known {
    fn of(batch: &Batch, known: impl Fn(SeqId) -> bool) -> Self {
        let mut of = Self {
            seqs: Vec::new(),
            cu_seqlens: vec![0],
            places: Vec::new(),
            tokens: Vec::new(),
            all: true,
        };
        for (place, (seq, tokens)) in batch.iter().enumerate() {
            if !known(seq) {
                of.all = false;
                continue;
            }
            of.seqs.push(seq);
            of.cu_seqlens.push(of.cu_seqlens[of.cu_seqlens.len() - 1] + tokens.len());
            of.places.push(place);
            of.tokens.push(tokens);
        }
        of
    }

    /// Their rows of a batch's.
    fn rows<'a>(&self, data: &'a [f32], row: usize) -> std::borrow::Cow<'a, [f32]> {
        if self.all {
            return data.into();
        }
        let of = |tokens: &Range<usize>| &data[tokens.start * row..tokens.end * row];
        self.tokens.iter().flat_map(of).copied().collect::<Vec<_>>().into()
    }

    /// Puts their rows in their places among a batch's, which are filled with `fill`.
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

impl KvStore for QuantStore {
    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = self.prepare(batch, k, v)?;
        let (seqs, ends) = (batch.seqs(), batch.cu_seqlens());
        with_numbers!(&k, k => with_slice(&v, |v| Ok(self.pool.append(seqs, ends, k, v)?)))
    }

    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        check_selections(batch, tokens, self.shape.kv_heads)?;
        let (k, v) = self.prepare(batch, k, v)?;
        let (seqs, ends) = (batch.seqs(), batch.cu_seqlens());
        let lists: Vec<_> = tokens.iter().flat_map(|of| of.heads()).cloned().collect();
        with_numbers!(&k, k => with_slice(&v, |v| {
            Ok(self.pool.append_selected(seqs, ends, k, v, &lists)?)
        }))
    }

    fn attend(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: longctx_core::Mask<'_>,
    ) -> Result<AttentionState> {
        let (tokens, heads, dv) = (batch.tokens(), self.shape.heads, self.shape.value_dim);
        let done = self.of_known(batch, q, mask, |queries, known, mask| {
            let Attended { out, lse } =
                self.pool.attend(&queries, &known.seqs, &known.cu_seqlens, mask)?;
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

    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: longctx_core::Mask<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let heads = self.shape.heads;
        let lse = lse.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut all = vec![Vec::new(); batch.seqs().len() * heads];
        self.of_known(batch, q, mask, |queries, known, mask| {
            let lse = known.rows(&lse, heads);
            let sums =
                self.pool.attention_sums(&queries, &lse, &known.seqs, &known.cu_seqlens, mask)?;
            let places = known.places.iter().flat_map(|i| i * heads..(i + 1) * heads);
            places.zip(sums).for_each(|(place, sums)| all[place] = sums);
            Ok(())
        })?;
        Ok(all)
    }

    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        Ok(self.pool.retain(seq, keep.heads())?)
    }

    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let (keys, values) = self.pool.read(seq, kv_head)?;
        let rows =
            |x: Vec<f32>, d: usize| Tensor::from_vec(x.clone(), (x.len() / d, d), &Device::Cpu);
        Ok((rows(keys, self.shape.head_dim)?, rows(values, self.shape.value_dim)?))
    }

    fn lens(&self, seq: SeqId) -> Vec<usize> {
        self.pool.lens(seq).unwrap_or_default()
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        Ok(self.pool.fork(from, to)?)
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        Ok(self.pool.check_truncate(seq, len)?)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        Ok(self.pool.truncate(seq, len)?)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.pool.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.pool.seqs().collect()
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.pool.can_append(batch.seqs(), batch.cu_seqlens())
    }

    fn footprint(&self) -> Footprint {
        as_footprint(self.pool.footprint())
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        as_footprint(self.pool.seq_footprint(seq))
    }

    fn clear(&mut self) {
        self.pool.clear();
    }
}

fn as_footprint(bytes: PoolBytes) -> Footprint {
    let PoolBytes { codes, scales, residual, bookkeeping, slack } = bytes;
    Footprint { payload: codes, scales, residual, bookkeeping, slack }
}

use std::sync::Arc;

use crate::{Format, Head, HeadBytes, Queries, Rotary};
use candle_core::{DType, Device, Tensor};
use longctx_core::attention::with_slice;
use longctx_core::{
    AttentionShape, Error, Footprint, KvStore, Partial, Result, Selection, Visible,
};
use rayon::prelude::*;

/// Packed keys and values of one layer: a [`Head`] per batch entry and kv head. Attention reads the codes as they lie, on the host; tensors of
/// another device are copied there and back.
#[derive(Debug, Clone)]
pub struct QuantStore {
    shape: AttentionShape,
    /// What every head begins as.
    empty: Head,
    batch: usize,
    heads: Vec<Head>,
}

impl QuantStore {
    /// An empty store.
    ///
    /// # Errors
    /// [`Error::Setting`] if the format does not fit the heads, or has keys [before RoPE](crate::KeyBasis::BeforeRope).
    pub fn new(shape: AttentionShape, format: Format) -> Result<Self> {
        let empty = Head::new(shape.head_dim, format)?;
        Ok(Self { shape, empty, batch: 0, heads: Vec::new() })
    }

    /// An empty store whose keys come as they are before the rotary embedding; its queries come rotated.
    ///
    /// # Errors
    /// [`Error::Setting`] if the format or the embedding does not fit the heads.
    pub fn before_rope(shape: AttentionShape, format: Format, rotary: Arc<Rotary>) -> Result<Self> {
        let empty = Head::before_rope(shape.head_dim, format, rotary)?;
        Ok(Self { shape, empty, batch: 0, heads: Vec::new() })
    }

    /// A store of heads that another one held: `[batch * kv_heads]`, as [`heads`](Self::heads) gives them. None make an empty store.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if they are no whole number of batch entries, or are held in another way than this store's.
    pub fn with_heads(self, heads: Vec<Head>) -> Result<Self> {
        if !heads.len().is_multiple_of(self.shape.kv_heads) {
            let expected = format!("a multiple of {}", self.shape.kv_heads);
            return Err(Error::mismatch("packed heads", expected, heads.len()));
        }
        let of = |head: &Head| (head.head_dim(), head.format(), head.rotary().cloned());
        if let Some(other) = heads.iter().find(|head| of(head) != of(&self.empty)) {
            let (expected, got) = (format!("{:?}", of(&self.empty)), format!("{:?}", of(other)));
            return Err(Error::mismatch("format of packed heads", expected, got));
        }
        Ok(Self { batch: heads.len() / self.shape.kv_heads, heads, ..self })
    }

    /// How keys and values are held.
    pub fn format(&self) -> Format {
        self.empty.format()
    }

    /// The packed heads, `[batch * kv_heads]`; none before the first append.
    pub fn heads(&self) -> &[Head] {
        &self.heads
    }

    fn queries<R>(
        &self,
        q: &Tensor,
        f: impl FnOnce(usize, Queries<'_>) -> crate::Result<R>,
    ) -> Result<R> {
        let (batch, tokens) = self.shape.check_q(q)?;
        if self.heads.is_empty() {
            return Err(Error::mismatch("store", "entries to attend over", "none"));
        }
        if batch != self.batch {
            return Err(Error::mismatch("batch", self.batch, batch));
        }
        let q = q.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        with_slice::<f32, _>(&q, |data| {
            let AttentionShape { heads, scale, soft_cap, .. } = self.shape;
            Ok(f(batch, Queries { data, heads, tokens, scale, soft_cap })?)
        })
    }

    /// A causal query must find its own token in every head.
    fn check_causal(&self, q: &Tensor, visible: Visible) -> Result<()> {
        let (_, tokens) = self.shape.check_q(q)?;
        let shortest = self.heads.iter().map(Head::len).min().unwrap_or(0);
        if visible == Visible::Causal && shortest < tokens {
            let expected = format!("at least the {tokens} of the queries' own tokens");
            return Err(Error::mismatch("entries of a kv head", expected, shortest));
        }
        Ok(())
    }
}

impl KvStore for QuantStore {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let (batch, tokens) = self.shape.check_kv(k, v)?;
        let d = self.shape.head_dim;
        if self.heads.is_empty() {
            self.heads = vec![self.empty.clone(); batch * self.shape.kv_heads];
            self.batch = batch;
        }
        if batch != self.batch {
            return Err(Error::mismatch("batch", self.batch, batch));
        }
        let rows = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous();
        let (k, v) = (rows(k)?, rows(v)?);
        let size = (tokens * d).max(1);
        // Few tokens are not worth other threads' wake-up.
        let at_once = 64usize.div_ceil(tokens.max(1));
        with_slice::<f32, _>(&k, |k| {
            with_slice::<f32, _>(&v, |v| {
                let parts = k.par_chunks_exact(size).zip(v.par_chunks_exact(size));
                let heads = self.heads.par_iter().zip(parts).with_min_len(at_once);
                // All heads' numbers are checked before any head takes them in.
                let checked: crate::Result<Vec<_>> =
                    heads.map(|(head, (k, v))| head.check(k, v)).collect();
                let heads = self.heads.par_iter_mut().zip(checked?).with_min_len(at_once);
                Ok(heads.try_for_each(|(head, tokens)| head.take(&tokens))?)
            })
        })
    }

    fn attend(&self, q: &Tensor, visible: Visible) -> Result<Partial> {
        self.check_causal(q, visible)?;
        let (_, tokens) = self.shape.check_q(q)?;
        let range =
            |head: usize, i| visible.range(i, tokens, self.heads[head].len(), self.shape.window);
        let done = self.queries(q, |batch, q| crate::attend(&self.heads, batch, &q, range))?;
        let (batch, heads) = (self.batch, self.shape.heads);
        Ok(Partial {
            out: Tensor::from_vec(
                done.out,
                (batch, heads, tokens, self.shape.head_dim),
                q.device(),
            )?,
            lse: Tensor::from_vec(done.lse, (batch, heads, tokens), q.device())?,
        })
    }

    fn mass(&self, q: &Tensor, lse: &Tensor, visible: Visible) -> Result<Vec<Vec<f32>>> {
        self.check_causal(q, visible)?;
        let (_, tokens) = self.shape.check_q(q)?;
        let range =
            |head: usize, i| visible.range(i, tokens, self.heads[head].len(), self.shape.window);
        let lse = lse.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        self.queries(q, |batch, q| crate::mass(&self.heads, batch, &q, &lse, range))
    }

    fn retain(&mut self, keep: &Selection) -> Result<()> {
        keep.check(&self.lens())?;
        for (head, keep) in self.heads.iter_mut().zip(keep.heads()) {
            head.retain(keep)?;
        }
        Ok(())
    }

    fn read(&self, batch: usize, kv_head: usize) -> Result<(Tensor, Tensor)> {
        if batch >= self.batch || kv_head >= self.shape.kv_heads {
            let expected = format!("one of {} x {}", self.batch, self.shape.kv_heads);
            return Err(Error::mismatch("kv head", expected, format!("{batch}, {kv_head}")));
        }
        let head = &self.heads[batch * self.shape.kv_heads + kv_head];
        let (keys, values) = head.read();
        let tensor = |x| Tensor::from_vec(x, (head.len(), self.shape.head_dim), &Device::Cpu);
        Ok((tensor(keys)?, tensor(values)?))
    }

    fn lens(&self) -> Vec<usize> {
        self.heads.iter().map(Head::len).collect()
    }

    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn footprint(&self) -> Footprint {
        let of = |HeadBytes { codes, scales, residual, live, slack }| Footprint {
            payload: codes,
            scales,
            residual,
            bookkeeping: live,
            slack,
        };
        self.heads.iter().map(|head| of(head.bytes())).sum()
    }

    fn reset(&mut self) {
        self.heads = Vec::new();
        self.batch = 0;
    }
}

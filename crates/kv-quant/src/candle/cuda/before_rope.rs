//! Keys packed before the rotary embedding. Attention unpacks a sequence's entries to f16, rotates
//! the keys and calls the prefill kernel: memory stays packed, but each call writes and reads all
//! entries in f16.

use super::CudaPool;
use crate::cuda::needs;
use crate::{Format, KeyBasis, Rotary};
use candle_core::{CudaDevice, DType, Tensor};
use longctx_core::{
    AttentionShape, AttentionState, AttentionSums, Batch, Error, Mask, Result, Rope, Selection,
    SeqId, attention,
};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// A [`CudaPool`] of keys that are not rotated. Every head of a sequence holds the same tokens.
#[derive(Debug, Clone)]
pub struct CudaBeforeRope {
    pool: CudaPool,
    rope: Arc<Rope>,
    rotary: Arc<Rotary>,
}

impl CudaBeforeRope {
    /// Creates an empty pool. As [`CudaPool::new`].
    pub fn new(
        shape: AttentionShape,
        format: Format,
        rotary: &Arc<Rotary>,
        device: &CudaDevice,
        capacity: Option<usize>,
    ) -> Result<Self> {
        let rope = Rope::with_frequencies(shape.head_dim, rotary.frequencies())?;
        let pool = CudaPool::new(shape, format.with_key_basis(KeyBasis::Given), device, capacity)?;
        Ok(Self { pool, rope: Arc::new(rope), rotary: rotary.clone() })
    }

    pub fn rotary(&self) -> &Arc<Rotary> {
        &self.rotary
    }

    pub fn format(&self) -> Format {
        self.pool.format().with_key_basis(KeyBasis::BeforeRope)
    }

    pub fn with_capacity(self, bytes: usize) -> Self {
        Self { pool: self.pool.with_capacity(bytes), ..self }
    }

    /// Computes attention over all entries or, with a causal mask, over those up to each query's
    /// own.
    pub fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        if let Mask::Entries(_) = mask {
            return Err(unsupported("a selection of entries"));
        }
        let (q, _) = self.pool.queries(batch, q, mask)?;
        let (k, v, ends) = self.pool.unpack_batch(batch)?;
        if k.elem_count() == 0 {
            let lse = Tensor::full(f32::NEG_INFINITY, (q.dim(0)?, q.dim(1)?), q.device())?;
            return Ok(AttentionState { out: q.zeros_like()?.to_dtype(DType::F32)?, lse });
        }
        let of_seq = |ends: &[u32]| 0..(ends[1] - ends[0]) as usize;
        let k = self.rotated(&k.transpose(0, 1)?, ends.windows(2).flat_map(of_seq))?;
        let past = (&k, &v.transpose(0, 1)?);
        let state = attention::attend_past(batch, &q, past, &ends, &self.pool.shape, mask)?;
        state.ok_or_else(|| needs("a head size of the prefill kernels").into())
    }

    /// Rotates keys `[entries, heads, head_dim]` to the positions of their tokens.
    fn rotated(&self, k: &Tensor, tokens: impl Iterator<Item = usize>) -> Result<Tensor> {
        let positions: Vec<_> = tokens.map(|token| (self.rotary.first() + token) as i64).collect();
        self.rope.apply(k, &positions)
    }

    /// Returns the rotated keys and the values of one kv head in f32.
    pub fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let (k, v) = self.pool.read(seq, kv_head)?;
        let rotated = self.rotated(&k.unsqueeze(1)?, 0..k.dim(0)?)?;
        Ok((rotated.squeeze(1)?, v))
    }

    pub fn attention_sums(
        &self,
        _: &Batch,
        _: &Tensor,
        _: &Tensor,
        _: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        Err(unsupported("attention sums"))
    }

    pub fn append_selected(
        &mut self,
        _: &Batch,
        _: &Tensor,
        _: &Tensor,
        _: &[Selection],
    ) -> Result<()> {
        Err(unsupported("a selection of tokens"))
    }

    /// Keeps all entries. As on the CPU, none can be dropped.
    pub fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        self.pool.sequence(seq)?;
        let lens = self.pool.lens(seq);
        keep.check_unread(&lens)?;
        if keep.lens() != lens {
            let expected = format!("all {lens:?}, for keys packed before RoPE");
            return Err(Error::mismatch("entries to keep", expected, format!("{:?}", keep.lens())));
        }
        Ok(())
    }
}

fn unsupported(what: &str) -> Error {
    Error::Unsupported(format!("{what} of keys packed before RoPE on a CUDA device"))
}

impl Deref for CudaBeforeRope {
    type Target = CudaPool;

    fn deref(&self) -> &CudaPool {
        &self.pool
    }
}

impl DerefMut for CudaBeforeRope {
    fn deref_mut(&mut self) -> &mut CudaPool {
        &mut self.pool
    }
}

//! Attention on the device over a cache chosen by the caller.

use super::device_context::DeviceContext;
use super::linear::Linear;
use crate::attention::Attention as Host;
use candle_core::Tensor;
use longctx_core::{AttentionShape, Batch, KvCache, Result, Step};

#[derive(Debug)]
pub struct Attention {
    shape: AttentionShape,
    qkv: Linear,
    out: Linear,
}

impl Attention {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        let (qkv, out) = (Linear::of(&host.qkv, to)?, Linear::new(&host.out, to)?);
        Ok(Self { shape: host.shape, qkv, out })
    }

    /// Maps `[tokens, hidden]` of all sequences of the batch to the same shape.
    pub fn forward(&self, x: &Tensor, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let tokens = batch.tokens();
        let qkv = self.qkv.apply(x)?.reshape((tokens, heads + 2 * kv_heads, head_dim))?;
        let part = |start, count| qkv.narrow(1, start, count)?.contiguous();
        let (q, k) = (part(0, heads)?, part(heads, kv_heads)?);
        let v = part(heads + kv_heads, kv_heads)?;
        let attended = cache.attend(&Step { batch, q: &q, k: &k, v: &v })?.contiguous()?;
        self.out.apply(&attended.reshape((tokens, heads * head_dim))?)
    }
}

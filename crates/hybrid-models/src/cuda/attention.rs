//! Attention whose keys and values a cache of the caller's choice keeps, on the device.

use std::sync::Arc;

use super::Input;
use super::linear::Linear;
use super::target::Target;
use crate::attention::Attention as Host;
use candle_core::Tensor;
use longctx_core::{AttentionShape, KvCache, Result, Rope, Step};

#[derive(Debug)]
pub struct Attention {
    shape: AttentionShape,
    qkv: Linear,
    out: Linear,
    rope: Arc<Rope>,
}

impl Attention {
    pub fn new(host: &Host, to: &Target) -> Result<Self> {
        let (qkv, out) = (Linear::of(&host.qkv, to)?, Linear::new(&host.out, to)?);
        Ok(Self { shape: host.shape, qkv, out, rope: host.rope.clone() })
    }

    pub fn forward(&self, x: Input<'_>, cache: &mut dyn KvCache) -> Result<Tensor> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let qkv = self.qkv.apply(x.x)?;
        let qkv = qkv.reshape((x.batch, x.tokens, heads + 2 * kv_heads, head_dim))?;
        let part = |start, count| qkv.narrow(2, start, count)?.transpose(1, 2)?.contiguous();
        let (q, k) = (part(0, heads)?, part(heads, kv_heads)?);
        let v = part(heads + kv_heads, kv_heads)?;
        let step = Step { q: &q, k: &k, v: &v, shape: &self.shape, rope: &self.rope };
        let attended = cache.attend(&step)?.transpose(1, 2)?.contiguous()?;
        self.out.apply(&attended.reshape((x.batch * x.tokens, heads * head_dim))?)
    }
}

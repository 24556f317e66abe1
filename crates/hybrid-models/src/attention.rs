//! Attention over a cache chosen by the caller.

use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::linear::Linear;
use crate::matrix::{Matrix, Rows};
use candle_core::{Device, Tensor};
use longctx_core::{AttentionShape, Batch, Error, KvCache, Result, Rope, Step};

#[derive(Debug)]
pub struct Attention {
    pub hidden: usize,
    pub shape: AttentionShape,
    pub qkv: Matrix,
    pub out: Linear,
    pub rope: Arc<Rope>,
}

impl Attention {
    /// Loads `name.q_proj.weight`, `k_proj`, `v_proj` and `o_proj`. Only `o_proj` may have a bias.
    pub fn load(
        w: &Checkpoint,
        name: &str,
        hidden: usize,
        shape: AttentionShape,
        rope: Arc<Rope>,
        out_bias: bool,
    ) -> Result<Self> {
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let part = |part: &str, out| (format!("{name}.{part}.weight"), out);
        let names = [part("q_proj", queries), part("k_proj", keys), part("v_proj", keys)];
        Ok(Self {
            hidden,
            shape,
            qkv: w.concat(&names, hidden)?,
            out: Linear::load(w, &format!("{name}.o_proj"), hidden, queries, out_bias)?,
            rope,
        })
    }

    /// Maps `[tokens, hidden]` of all sequences of the batch to the same shape.
    pub fn forward(
        &self,
        x: &[f32],
        batch: &Batch,
        cache: &mut dyn KvCache,
        out: &mut [f32],
    ) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let tokens = batch.tokens();
        let mut qkv = vec![0.0; tokens * self.qkv.out()];
        self.qkv.apply(Rows::new(x, self.hidden), &mut qkv);
        let qkv = Tensor::from_vec(qkv, (tokens, heads + 2 * kv_heads, head_dim), &Device::Cpu)?;
        let part = |start, count| qkv.narrow(1, start, count)?.contiguous();
        let (q, k) = (part(0, heads)?, part(heads, kv_heads)?);
        let v = part(heads + kv_heads, kv_heads)?;
        let attended = cache.attend(&Step { batch, q: &q, k: &k, v: &v })?;
        let attended: Vec<f32> = attended.flatten_all()?.to_vec1()?;
        self.out.apply(Rows::new(&attended, heads * head_dim), out);
        Ok(())
    }
}

/// Returns the cache of the next attention layer.
///
/// # Errors
/// [`Error::Mismatch`] if there is none.
pub fn next_cache<'a>(
    mut caches: impl Iterator<Item = &'a mut Box<dyn KvCache>>,
) -> Result<&'a mut (dyn KvCache + 'static)> {
    let cache = caches.next().map(Box::as_mut);
    cache.ok_or_else(|| Error::mismatch("caches of a session", "one per attention layer", "fewer"))
}

//! What an attention layer looks like to its cache.

use crate::{Error, Result};
use candle_core::Tensor;

/// One attention layer's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads` (equal: MHA; fewer: GQA; one: MQA).
    pub kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// What scores q·k are multiplied with, most often `head_dim^-0.5`.
    pub scale: f32,
    /// Sliding window: a query sees itself and the `window - 1` tokens before it. `None`: all.
    pub window: Option<usize>,
    /// Scores s become `soft_cap * tanh(s / soft_cap)`. `None`: as they are.
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Full causal attention with the usual scale `head_dim^-0.5`.
    ///
    /// # Errors
    /// [`Error::Setting`] if a number is zero or `kv_heads` does not divide `heads`.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        if head_dim == 0 {
            return Err(Error::setting("head_dim", "at least 1", head_dim));
        }
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of the {heads} query heads");
            return Err(Error::setting("kv_heads", expected, kv_heads));
        }
        let scale = (head_dim as f32).powf(-0.5);
        Ok(Self { heads, kv_heads, head_dim, scale, window: None, soft_cap: None })
    }

    /// Query heads that share one kv head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Checks queries `[batch, heads, tokens, head_dim]`; gives `(batch, tokens)`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming `q`.
    pub fn check_q(&self, q: &Tensor) -> Result<(usize, usize)> {
        self.check("q", q, self.heads)
    }

    /// Checks keys and values `[batch, kv_heads, tokens, head_dim]`; gives `(batch, tokens)`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming `k` or `v`.
    pub fn check_kv(&self, k: &Tensor, v: &Tensor) -> Result<(usize, usize)> {
        let of_k = self.check("k", k, self.kv_heads)?;
        let of_v = self.check("v", v, self.kv_heads)?;
        if of_k != of_v {
            return Err(Error::mismatch(
                "v",
                format!("the shape of k, {:?}", k.dims()),
                format!("{:?}", v.dims()),
            ));
        }
        Ok(of_k)
    }

    fn check(&self, what: &str, x: &Tensor, heads: usize) -> Result<(usize, usize)> {
        match x.dims() {
            &[batch, h, tokens, d] if h == heads && d == self.head_dim => Ok((batch, tokens)),
            dims => Err(Error::mismatch(
                what,
                format!("[batch, {heads}, tokens, {}]", self.head_dim),
                format!("{dims:?}"),
            )),
        }
    }
}

/// One attention layer of a model, as the maker of its cache sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerShape {
    /// Which layer of the model, from 0.
    pub layer: usize,
    /// Layers in the model.
    pub layers: usize,
    /// The layer's attention.
    pub attention: AttentionShape,
}

//! The shape and settings of an attention layer.

use std::sync::Arc;

use crate::{AttentionState, Error, Result, Rope, latent};
use candle_core::{DType, Tensor};

/// The dimensions and mask of an attention layer. Stores and [`attend`](crate::attention::attend)
/// [check](Self::check) it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads` (equal: MHA; fewer: GQA; one: MQA).
    pub kv_heads: usize,
    /// Channels of a query or key.
    pub head_dim: usize,
    /// Channels of a value, usually `head_dim`.
    pub value_dim: usize,
    /// Softmax scale of the scores q·k, usually `head_dim^-0.5`.
    pub scale: f32,
    /// Sliding window: a query sees itself and the `window - 1` tokens before it. `None`: all.
    pub window: Option<usize>,
    /// Soft cap: a score s becomes `soft_cap * tanh(s / soft_cap)`. `None`: no cap.
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Creates the shape of full causal attention with scale `head_dim^-0.5`.
    ///
    /// # Errors
    /// [`Error::Setting`] if a number is zero or `kv_heads` does not divide `heads`.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        // With a head_dim of 0, the scale would not be finite.
        let scale = (head_dim.max(1) as f32).powf(-0.5);
        let (value_dim, window, soft_cap) = (head_dim, None, None);
        let shape = Self { heads, kv_heads, head_dim, value_dim, scale, window, soft_cap };
        shape.check()?;
        Ok(shape)
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Setting`] if a dimension is zero, `kv_heads` does not divide `heads`, `window` is
    /// zero, or `scale` or `soft_cap` is not finite.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("value_dim", self.value_dim),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Error::setting(name, "at least 1", size));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of the {} query heads", self.heads);
            return Err(Error::setting("kv_heads", expected, self.kv_heads));
        }
        if self.window == Some(0) {
            return Err(Error::setting("window", "at least 1", 0));
        }
        let numbers = [("scale", Some(self.scale)), ("soft_cap", self.soft_cap)];
        for (name, value) in numbers.into_iter().filter_map(|(name, x)| Some((name, x?))) {
            if !value.is_finite() {
                return Err(Error::setting(name, "a finite number", value));
            }
        }
        Ok(())
    }

    /// Returns the number of query heads that share one kv head.
    pub fn heads_per_kv(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Checks queries `[tokens, heads, head_dim]` and returns the number of tokens.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming `q`.
    pub fn check_q(&self, q: &Tensor) -> Result<usize> {
        check("q", q, self.heads, self.head_dim)
    }

    /// Checks keys `[tokens, kv_heads, head_dim]` and values `[tokens, kv_heads, value_dim]` and
    /// returns the number of tokens.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming `k` or `v`.
    pub fn check_kv(&self, k: &Tensor, v: &Tensor) -> Result<usize> {
        let tokens = check("k", k, self.kv_heads, self.head_dim)?;
        let of_v = check("v", v, self.kv_heads, self.value_dim)?;
        if tokens != of_v {
            return Err(Error::mismatch("tokens of v", format!("the {tokens} of k"), of_v));
        }
        Ok(tokens)
    }
}

fn check(what: &str, x: &Tensor, heads: usize, channels: usize) -> Result<usize> {
    match x.dims() {
        &[tokens, h, d] if h == heads && d == channels => Ok(tokens),
        dims => {
            let expected = format!("[tokens, {heads}, {channels}]");
            Err(Error::mismatch(what, expected, format!("{dims:?}")))
        }
    }
}

/// An attention layer of a model. A cache is bound to it at creation.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// Index of the layer in the model, from 0.
    pub index: usize,
    /// Number of layers of the model.
    pub num_layers: usize,
    /// Dimensions and mask.
    pub shape: AttentionShape,
    /// The rotary embedding that the cache applies to queries and keys. `None`: the engine rotates
    /// them itself, or the layer has no positions.
    pub rope: Option<Arc<Rope>>,
    /// Learned sink logits, `[heads]`. Each is added to the softmax of its query head and has no
    /// value.
    pub sink_logits: Option<Arc<[f32]>>,
    /// Multi-head latent attention: the values are the last `value_dim` channels of the keys, which
    /// the rotary embedding does not rotate. A [`LatentCache`](crate::LatentCache) holds them once.
    pub latent: bool,
}

impl LayerSpec {
    /// Creates the only layer of a model, with queries and keys that are already rotated.
    pub fn new(shape: AttentionShape) -> Self {
        Self { index: 0, num_layers: 1, shape, rope: None, sink_logits: None, latent: false }
    }

    /// Returns the layer with a rotary embedding that the cache applies.
    #[must_use]
    pub fn with_rope(self, rope: Arc<Rope>) -> Self {
        Self { rope: Some(rope), ..self }
    }

    /// Returns the layer as layer `index` of `num_layers`.
    #[must_use]
    pub fn at(self, index: usize, num_layers: usize) -> Self {
        Self { index, num_layers, ..self }
    }

    /// Returns the layer with learned sink logits.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless there is one logit for each query head.
    pub fn with_sink_logits(self, logits: Arc<[f32]>) -> Result<Self> {
        if logits.len() != self.shape.heads {
            return Err(Error::mismatch("sink logits", self.shape.heads, logits.len()));
        }
        Ok(Self { sink_logits: Some(logits), ..self })
    }

    /// Marks the values as the last channels of the keys: multi-head latent attention.
    ///
    /// # Errors
    /// [`Error::Setting`] for a shape that is not valid for latent attention, or a rotary embedding
    /// that rotates the values' channels.
    pub fn with_latent(self) -> Result<Self> {
        latent::check_shape(&self.shape)?;
        let most = self.shape.head_dim - self.shape.value_dim;
        if let Some(rope) = self.rope.as_ref().filter(|rope| rope.rotary_dims() > most) {
            let expected = format!("at most the {most} channels before the latent");
            return Err(Error::setting("rotary_dims", expected, rope.rotary_dims()));
        }
        Ok(Self { latent: true, ..self })
    }

    /// Returns the rotary embedding, for caches that move keys.
    ///
    /// # Errors
    /// [`Error::Setting`] naming `method` if the layer has none.
    pub fn require_rope(&self, method: &str) -> Result<&Arc<Rope>> {
        let missing = || {
            let expected = format!("a rotary embedding: {method} rotates keys itself");
            Error::setting("rope", expected, "none")
        };
        self.rope.as_ref().ok_or_else(missing)
    }

    /// Returns whether a [prepared step](crate::PreparedDecode) can rotate: there is a CUDA kernel
    /// for the embedding, or no embedding.
    pub fn rotates_on_cuda(&self) -> bool {
        self.rope.as_ref().is_none_or(|rope| rope.has_cuda_kernel())
    }

    /// Rotates `[tokens, heads, head_dim]` to positions; returns it unchanged if there is no
    /// embedding.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn rotate(&self, x: &Tensor, positions: &[i64]) -> Result<Tensor> {
        match &self.rope {
            Some(rope) => rope.apply(x, positions),
            None => Ok(x.clone()),
        }
    }

    /// Returns the layer's output in `dtype` from the attention over all entries that its queries
    /// see. Adds the learned sink logits, if any.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn output(&self, state: AttentionState, dtype: DType) -> Result<Tensor> {
        let state = match &self.sink_logits {
            Some(logits) => state.with_sink_logits(logits)?,
            None => state,
        };
        Ok(state.out.to_dtype(dtype)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DenseStore;

    #[test]
    fn invalid_fields_are_named() {
        let shape = AttentionShape::new(6, 2, 8).unwrap();
        let wrong = [
            ("heads", AttentionShape { heads: 0, ..shape }),
            ("kv_heads", AttentionShape { kv_heads: 0, ..shape }),
            ("kv_heads", AttentionShape { kv_heads: 4, ..shape }),
            ("head_dim", AttentionShape { head_dim: 0, ..shape }),
            ("value_dim", AttentionShape { value_dim: 0, ..shape }),
            ("window", AttentionShape { window: Some(0), ..shape }),
            ("scale", AttentionShape { scale: f32::NAN, ..shape }),
            ("soft_cap", AttentionShape { soft_cap: Some(f32::INFINITY), ..shape }),
        ];
        for (name, shape) in wrong {
            let error = DenseStore::new(shape, DType::F32).unwrap_err();
            assert!(matches!(&error, Error::Setting { .. }), "{error}");
            assert!(error.to_string().contains(&format!("`{name}`")), "{error}");
        }
        assert!(AttentionShape::new(6, 2, 0).is_err());
    }
}

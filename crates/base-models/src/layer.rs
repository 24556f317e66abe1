//! One layer of the decoder.

use crate::config::{Activation, Config, QkNorm};
use crate::feed_forward::FeedForward;
use crate::latent_attention::LatentAttention;
use crate::linear::{FusedLinear, Linear};
use crate::weights::Weights;
use candle_core::Tensor;
use candle_nn::ops::rms_norm;
use longctx_core::{
    AttentionShape, Batch, KvCache, PostAttention, PostAttentionWeights, Result, Step, add_rms_norm,
};

/// The attention and the feed-forward block, with their norms.
#[derive(Debug)]
pub(crate) struct Layer {
    pub shape: AttentionShape,
    eps: f32,
    residual_scale: f64,
    attention_norms: Norms,
    attention: AnyAttention,
    feed_forward_norms: Norms,
    feed_forward: FeedForward,
}

/// The norms of a block's input and output.
#[derive(Debug)]
struct Norms {
    before: Option<Tensor>,
    after: Option<Tensor>,
}

#[derive(Debug)]
enum AnyAttention {
    /// Attention with separate keys and values per kv head.
    Heads(Attention),
    /// Latent attention, with one latent for all heads.
    Latent(LatentAttention),
}

#[derive(Debug)]
struct Attention {
    qkv: FusedLinear,
    clamp: Option<f64>,
    norm: Option<HeadNorm>,
    /// The factor of each channel of a query, `[head_dim]`. A rotary scaling's attention factor
    /// applies to queries and keys, so its square is applied here, to the rotated channels.
    query_scale: Option<Tensor>,
    out: Linear,
}

#[derive(Debug)]
struct HeadNorm {
    q: Tensor,
    k: Tensor,
    per_head: bool,
}

/// Loads a norm's weights, `[size]`.
pub(crate) fn norm(c: &Config, w: &impl Weights, name: &str, size: usize) -> Result<Tensor> {
    let weights = w.tensor(&format!("{name}.weight"), &[size])?;
    Ok(if c.norm_offset { (weights + 1.0)? } else { weights })
}

impl Layer {
    pub fn load(c: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let norms = |before: &str, after: &str| -> Result<Norms> {
            let load = |part: &str, wanted: bool| {
                let name = format!("{}.{layer}.{part}", names.layers);
                wanted.then(|| norm(c, w, &name, c.hidden_size)).transpose()
            };
            Ok(Norms { before: load(before, c.pre_norms)?, after: load(after, c.post_norms)? })
        };
        Ok(Self {
            shape: c.attention(layer)?,
            eps: c.norm_eps as f32,
            residual_scale: c.residual_scale,
            attention_norms: norms(names.attention_norm, names.attention_post_norm)?,
            attention: match c.latent {
                Some(sizes) => AnyAttention::Latent(LatentAttention::load(c, sizes, layer, w)?),
                None => AnyAttention::Heads(Attention::load(c, layer, w)?),
            },
            feed_forward_norms: norms(names.feed_forward_norm, names.feed_forward_post_norm)?,
            feed_forward: FeedForward::load(c, layer, w)?,
        })
    }

    /// Runs the layer on the tokens of all sequences of the batch. `after`: the part after attention,
    /// with the projection after the layer, if the batch has few tokens.
    pub fn forward(
        &self,
        input: LayerInput,
        after: Option<&PostAttention>,
        cache: &mut dyn KvCache,
        batch: &Batch,
    ) -> Result<LayerInput> {
        let (x, y) = match &self.attention {
            AnyAttention::Heads(heads) => {
                let (x, [q, k, v]) = heads.project(self, input)?;
                let y = cache.attend(&Step { batch, q: &q, k: &k, v: &v })?;
                let y = y.reshape((batch.tokens(), self.shape.heads * self.shape.value_dim))?;
                if let Some(after) = after {
                    let (x, projected) = after.forward(&y, &x)?;
                    return Ok(LayerInput::Projected(x, projected));
                }
                (x, heads.out.forward(&y)?)
            }
            AnyAttention::Latent(latent) => {
                let (x, normed) = self.norm_input(input)?;
                (x, latent.forward(&normed, cache, batch)?)
            }
        };
        let x = self.residual(x, y, &self.attention_norms)?;
        let (x, normed) = x.add_and_norm(self.feed_forward_norms.before.as_ref(), self.eps)?;
        let y = self.feed_forward(&normed)?;
        self.residual(x, y, &self.feed_forward_norms).map(LayerInput::Stream)
    }

    /// Returns the projection with which the layer starts, if it is a single product.
    pub fn projection(&self) -> Option<Projection<'_>> {
        let AnyAttention::Heads(heads) = &self.attention else { return None };
        let norm = self.attention_norms.before.as_ref()?;
        Some(Projection { norm, weight: heads.qkv.single()?.weight().dense()? })
    }

    /// Returns the part from the output projection to `next`; `None` if the layer has other weights or
    /// operations.
    ///
    /// # Errors
    /// Those of [`PostAttention::new`].
    pub fn post_attention(&self, next: Projection<'_>) -> Result<Option<PostAttention>> {
        self.post_attention_weights(next).map(PostAttention::new).transpose()
    }

    fn post_attention_weights(&self, next: Projection<'_>) -> Option<PostAttentionWeights> {
        let AnyAttention::Heads(heads) = &self.attention else { return None };
        let FeedForward::GatedMlp(block) = &self.feed_forward else { return None };
        let post_norms = [&self.attention_norms.after, &self.feed_forward_norms.after];
        let plain = self.residual_scale == 1.0 && block.activation == Activation::Silu;
        if !plain || post_norms.into_iter().any(Option::is_some) {
            return None;
        }
        Some(PostAttentionWeights {
            output: heads.out.unbiased()?.clone(),
            norm: self.feed_forward_norms.before.clone()?,
            gate_up: block.gate_up.single()?.unbiased()?.clone(),
            down: block.down.unbiased()?.clone(),
            next_norm: next.norm.clone(),
            next: next.weight.clone(),
            eps: self.eps,
        })
    }

    /// Returns the residual stream and its norm.
    fn norm_input(&self, input: LayerInput) -> Result<(Tensor, Tensor)> {
        let stream = match input {
            LayerInput::Stream(stream) => stream,
            LayerInput::Projected(x, _) => ResidualStream { x, y: None },
        };
        stream.add_and_norm(self.attention_norms.before.as_ref(), self.eps)
    }

    /// Runs only the feed-forward block, on its normalised input `[tokens, hidden]`.
    pub fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        self.feed_forward.forward(x)
    }

    /// Returns the residual stream after a block: its input `x` and its output `y`, to be added.
    fn residual(&self, x: Tensor, y: Tensor, norms: &Norms) -> Result<ResidualStream> {
        let y = match &norms.after {
            Some(weights) => rms_norm(&y.contiguous()?, weights, self.eps)?,
            None => y,
        };
        let y = if self.residual_scale == 1.0 { y } else { (y * self.residual_scale)? };
        Ok(ResidualStream { x, y: Some(y) })
    }
}

/// The input of a layer.
#[derive(Debug)]
pub(crate) enum LayerInput {
    /// The residual stream.
    Stream(ResidualStream),
    /// The residual stream, `[tokens, hidden]`, and its [`Projection`], `[tokens, out]`.
    Projected(Tensor, Tensor),
}

/// A norm of the residual stream and the product after it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Projection<'a> {
    /// `[hidden]`.
    pub norm: &'a Tensor,
    /// `[out, hidden]`.
    pub weight: &'a Tensor,
}

/// The residual stream, `[tokens, hidden]`: the sum of `x` and the last block's output. The
/// addition is fused with the next block's norm.
#[derive(Debug)]
pub(crate) struct ResidualStream {
    pub x: Tensor,
    pub y: Option<Tensor>,
}

impl ResidualStream {
    /// Returns the sum and its norm; without weights, the sum twice.
    pub fn add_and_norm(&self, weights: Option<&Tensor>, eps: f32) -> Result<(Tensor, Tensor)> {
        let Some(weights) = weights else {
            let sum = match &self.y {
                Some(y) => (&self.x + y)?,
                None => self.x.clone(),
            };
            return Ok((sum.clone(), sum));
        };
        add_rms_norm(&self.x, self.y.as_ref(), weights, eps)
    }

    /// Returns the rows of some tokens.
    pub fn select(&self, tokens: &Tensor) -> Result<Self> {
        let y = self.y.as_ref().map(|y| y.index_select(tokens, 0)).transpose()?;
        Ok(Self { x: self.x.index_select(tokens, 0)?, y })
    }
}

impl Attention {
    fn load(c: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let name = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let hidden = c.hidden_size;
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let linear = |part, out, inner, bias| w.linear(&name(part), out, inner, bias);
        let fused = !names.query_key_value.is_empty()
            && w.has(&format!("{}.weight", name(names.query_key_value)));
        let qkv = match fused {
            true => {
                let sizes = vec![queries, keys, keys];
                let out = sizes.iter().sum();
                FusedLinear::from_single(
                    linear(names.query_key_value, out, hidden, c.qkv_bias)?,
                    sizes,
                )
            }
            false => FusedLinear::new(vec![
                linear(names.query, queries, hidden, c.qkv_bias)?,
                linear(names.key, keys, hidden, c.qkv_bias)?,
                linear(names.value, keys, hidden, c.qkv_bias)?,
            ])?,
        };
        let head_norm = |sizes: (usize, usize), per_head| -> Result<Option<HeadNorm>> {
            let q = norm(c, w, &name(names.query_norm), sizes.0)?;
            let k = norm(c, w, &name(names.key_norm), sizes.1)?;
            Ok(Some(HeadNorm { q, k, per_head }))
        };
        let norm = match c.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => head_norm((c.head_dim, c.head_dim), true)?,
            QkNorm::AllHeads => head_norm((queries, keys), false)?,
        };
        Ok(Self {
            qkv,
            clamp: c.clamp_qkv,
            norm,
            query_scale: query_scale(c, layer, w)?,
            out: linear(names.out, hidden, queries, c.out_bias)?,
        })
    }

    /// Returns the residual stream, and the queries, keys and values of its norm.
    fn project(&self, layer: &Layer, input: LayerInput) -> Result<(Tensor, [Tensor; 3])> {
        let head_dim = layer.shape.head_dim;
        let (x, projected) = match input {
            LayerInput::Projected(x, projected) => (x, self.qkv.finish_heads(projected, head_dim)?),
            input => {
                let (x, normed) = layer.norm_input(input)?;
                (x, self.qkv.forward_heads(&normed, head_dim)?)
            }
        };
        let of = |i: usize, norm: Option<&Tensor>| self.norm_heads(&projected[i], norm, layer.eps);
        let norm = self.norm.as_ref();
        let mut q = of(0, norm.map(|norm| &norm.q))?;
        if let Some(scale) = &self.query_scale {
            q = q.broadcast_mul(scale)?;
        }
        Ok((x, [q, of(1, norm.map(|norm| &norm.k))?, of(2, None)?]))
    }

    /// Applies the clamp and a norm to `[tokens, heads, head_dim]`.
    fn norm_heads(&self, x: &Tensor, norm: Option<&Tensor>, eps: f32) -> Result<Tensor> {
        let mut x = x.clone();
        let per_head = self.norm.as_ref().is_some_and(|norm| norm.per_head);
        if let Some(norm) = norm.filter(|_| !per_head) {
            let all = x.contiguous()?.flatten_from(1)?;
            x = rms_norm(&all, norm, eps)?.reshape(x.dims())?;
        }
        if let Some(limit) = self.clamp {
            x = x.clamp(-limit, limit)?;
        }
        if let Some(norm) = norm.filter(|_| per_head) {
            x = rms_norm(&x.contiguous()?, norm, eps)?;
        }
        Ok(x)
    }
}

/// Returns the factor of each channel of a layer's queries; `None` if all are 1.
pub(crate) fn query_scale(c: &Config, layer: usize, w: &impl Weights) -> Result<Option<Tensor>> {
    let Some(rope) = c.layer_rope(layer) else { return Ok(None) };
    let factor = rope.scaling.attention_factor();
    if factor == 1.0 {
        return Ok(None);
    }
    let of = |channel| if channel < rope.rotary_dims { (factor * factor) as f32 } else { 1.0 };
    let scale: Vec<f32> = (0..c.head_dim).map(of).collect();
    w.options().to_device(&scale).map(Some)
}

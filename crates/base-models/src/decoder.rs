//! The decoder: Llama's layers, with what Mistral and Qwen add.

use std::path::Path;
use std::sync::Arc;

use crate::config::Config;
use crate::folder::Folder;
use crate::linear::{Joined, Linear, Weight};
use crate::random::Random;
use crate::weights::{LoadOptions, Weights};
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use longctx_core::{
    AttentionShape, CausalLm, Error, Footprint, KvCache, LayerShape, Logits, Result, Rope, Step,
};

/// Tokens that go through a feed-forward block at a time: its inner activations, several times wider than the
/// model, never exist for the whole prompt.
const FEED_FORWARD_TOKENS: usize = 1024;

/// A decoder's weights, shared by all sessions that run on them.
#[derive(Debug, Clone)]
pub struct Transformer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    device: Device,
    dtype: DType,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `None` if the embedding's matrix is the output head.
    head: Option<Weight>,
    rope: Rope,
}

impl Transformer {
    /// From a folder with `config.json` and `model.safetensors` or its shards; no tokenizer is needed.
    ///
    /// # Errors
    /// As [`Pretrained::from_folder`](crate::Pretrained::from_folder).
    pub fn from_folder(folder: &Path, options: &LoadOptions) -> Result<Self> {
        let config = Config::from_folder(folder)?;
        Self::load(config, &Folder::open(folder, options)?, options)
    }

    /// With random weights (matrices from N(0, 0.02²), norms 1, biases 0): for benchmarks of a shape without its checkpoint.
    ///
    /// # Errors
    /// If the shape does not fit itself, or the device lacks the memory.
    pub fn random(config: Config, options: &LoadOptions) -> Result<Self> {
        Self::load(config, &Random(options.clone()), options)
    }

    pub(crate) fn load(config: Config, w: &impl Weights, options: &LoadOptions) -> Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = w.matrix("model.embed_tokens.weight", vocab, hidden)?;
        let head = match config.tied_embeddings {
            true => None,
            false => Some(w.matrix("lm_head.weight", vocab, hidden)?),
        };
        let layers =
            (0..config.layers).map(|i| Layer::load(&config, i, w)).collect::<Result<_>>()?;
        let norm = w.tensor("model.norm.weight", &[hidden])?;
        let rope =
            Rope::new(config.head_dim, config.head_dim, config.rope_theta, config.rope_scaling)?;
        let rope = match w.has("rope.factors.weight") {
            true => {
                let factors = w.tensor("rope.factors.weight", &[config.head_dim / 2])?;
                rope.with_factors(&factors.to_dtype(DType::F32)?.to_vec1()?)?
            }
            false => rope,
        };
        w.finish()?;
        let (device, dtype) = (options.device.clone(), options.dtype);
        let inner = Inner { config, device, dtype, embedding, layers, norm, head, rope };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// A session on these weights: a [`CausalLm`] whose layers remember through caches that `make` builds, one per layer.
    ///
    /// # Errors
    /// Whatever `make` reports.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerShape) -> Result<C>,
    ) -> Result<Decoder> {
        let layers = self.inner.layers.len();
        let cache = |(layer, l): (usize, &Layer)| -> Result<Box<dyn KvCache>> {
            Ok(Box::new(make(&LayerShape { layer, layers, attention: l.shape })?))
        };
        let caches = self.inner.layers.iter().enumerate().map(cache).collect::<Result<_>>()?;
        Ok(Decoder { model: self.clone(), caches, seen: 0 })
    }
}

/// A transformer at work: weights, and one cache per layer.
pub struct Decoder {
    model: Transformer,
    caches: Vec<Box<dyn KvCache>>,
    seen: usize,
}

impl Decoder {
    /// The weights.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// The caches, one per layer.
    pub fn caches(&self) -> &[Box<dyn KvCache>] {
        &self.caches
    }
}

impl CausalLm for Decoder {
    fn forward(&mut self, tokens: &Tensor, logits: Logits) -> Result<Tensor> {
        let model = &self.model.inner;
        let count = check_tokens(tokens, model.config.vocab_size)?;
        let mut x = model.embedding.embed(tokens, model.dtype)?;
        for (layer, cache) in model.layers.iter().zip(&mut self.caches) {
            x = layer.forward(&x, cache.as_mut(), &model.rope, model.config.norm_eps)?;
        }
        self.seen += count;
        if logits == Logits::Last {
            x = x.narrow(1, count - 1, 1)?.contiguous()?;
        }
        let x = rms_norm(&x, &model.norm, model.config.norm_eps as f32)?;
        let head = model.head.as_ref().unwrap_or(&model.embedding);
        Ok(head.forward(&x)?.to_dtype(DType::F32)?)
    }

    fn rewind(&mut self, seen: usize) -> Result<bool> {
        for layer in 0..self.caches.len() {
            if self.caches[layer].rewind(seen)? {
                continue;
            }
            if layer == 0 {
                return Ok(false);
            }
            // Layers with caches of different kinds: those before this one have already gone back.
            let what = format!("rewinding a model whose layer {layer} can't, unlike those before");
            return Err(Error::Unsupported(what));
        }
        self.seen = seen;
        Ok(true)
    }

    fn reset(&mut self) {
        self.caches.iter_mut().for_each(|cache| cache.reset());
        self.seen = 0;
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn footprint(&self) -> Footprint {
        self.caches.iter().map(|cache| cache.footprint()).sum()
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn context_length(&self) -> Option<usize> {
        Some(self.model.config().context_length)
    }

    fn family(&self) -> &str {
        &self.model.config().family
    }

    fn device(&self) -> &Device {
        &self.model.inner.device
    }
}

/// Checks the shape, the dtype and the largest id; gives the number of tokens.
fn check_tokens(tokens: &Tensor, vocab: usize) -> Result<usize> {
    let expected = || format!("u32 [batch, tokens] with at least one token, ids below {vocab}");
    match tokens.dims() {
        &[batch, count] if tokens.dtype() == DType::U32 && batch * count > 0 => {
            let largest = tokens.flatten_all()?.max(0)?.to_scalar::<u32>()?;
            if largest as usize >= vocab {
                return Err(Error::mismatch("tokens", expected(), format!("the id {largest}")));
            }
            Ok(count)
        }
        dims => {
            let got = format!("{} {dims:?}", tokens.dtype().as_str());
            Err(Error::mismatch("tokens", expected(), got))
        }
    }
}

#[derive(Debug)]
struct Layer {
    shape: AttentionShape,
    attention_norm: Tensor,
    qkv: Joined,
    /// Norms of the queries and the keys of each head.
    qk_norm: Option<(Tensor, Tensor)>,
    out: Linear,
    feed_forward_norm: Tensor,
    gate_up: Joined,
    down: Linear,
}

impl Layer {
    fn load(c: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        let shape = c.attention(layer)?;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |part: &str, out, inner, bias: bool| w.linear(&name(part), out, inner, bias);
        let norm = |part: &str, size| w.tensor(&name(&format!("{part}.weight")), &[size]);
        let qk_norm = match c.qk_norm {
            true => {
                Some((norm("self_attn.q_norm", c.head_dim)?, norm("self_attn.k_norm", c.head_dim)?))
            }
            false => None,
        };
        Ok(Self {
            shape,
            attention_norm: norm("input_layernorm", hidden)?,
            qkv: Joined::new(vec![
                linear("self_attn.q_proj", queries, hidden, c.qkv_bias)?,
                linear("self_attn.k_proj", keys, hidden, c.qkv_bias)?,
                linear("self_attn.v_proj", keys, hidden, c.qkv_bias)?,
            ])?,
            qk_norm,
            out: linear("self_attn.o_proj", hidden, queries, c.out_bias)?,
            feed_forward_norm: norm("post_attention_layernorm", hidden)?,
            gate_up: Joined::new(vec![
                linear("mlp.gate_proj", inner, hidden, c.mlp_bias)?,
                linear("mlp.up_proj", inner, hidden, c.mlp_bias)?,
            ])?,
            down: linear("mlp.down_proj", hidden, inner, c.mlp_bias)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        cache: &mut dyn KvCache,
        rope: &Rope,
        eps: f64,
    ) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attention_norm, eps as f32)?;
        let x = (x + self.attend(&normed, cache, rope, eps)?)?;
        let tokens = x.dim(1)?;
        let mut parts = Vec::new();
        for start in (0..tokens).step_by(FEED_FORWARD_TOKENS) {
            let part = x.narrow(1, start, FEED_FORWARD_TOKENS.min(tokens - start))?.contiguous()?;
            let normed = rms_norm(&part, &self.feed_forward_norm, eps as f32)?;
            parts.push((part + self.feed_forward(&normed)?)?);
        }
        match parts.as_slice() {
            [one] => Ok(one.clone()),
            parts => Ok(Tensor::cat(parts, 1)?),
        }
    }

    fn attend(&self, x: &Tensor, cache: &mut dyn KvCache, rope: &Rope, eps: f64) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let projected = self.qkv.forward(x)?;
        let heads = |i: usize, heads| -> Result<Tensor> {
            let split = projected[i].reshape((batch, tokens, heads, self.shape.head_dim))?;
            Ok(split.transpose(1, 2)?.contiguous()?)
        };
        let mut q = heads(0, self.shape.heads)?;
        let mut k = heads(1, self.shape.kv_heads)?;
        let v = heads(2, self.shape.kv_heads)?;
        drop(projected);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = rms_norm(&q, q_norm, eps as f32)?;
            k = rms_norm(&k, k_norm, eps as f32)?;
        }
        let out = cache.attend(&Step { q: &q, k: &k, v: &v, shape: &self.shape, rope })?;
        let width = self.shape.heads * self.shape.head_dim;
        self.out.forward(&out.transpose(1, 2)?.reshape((batch, tokens, width))?)
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up.forward(x)?;
        self.down.forward(&(silu(&gate_up[0].contiguous()?)? * &gate_up[1])?)
    }
}

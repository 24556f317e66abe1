//! The decoder: Llama's layers, with what Mistral and Qwen add.

use std::path::Path;
use std::sync::Arc;

use crate::config::Config;
use crate::folder::Folder;
use crate::linear::{Joined, Linear, Weight};
use crate::random::Random;
use crate::session::Decoder;
use crate::weights::{LoadOptions, Weights};
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::rms_norm;
use longctx_core::{
    AttentionShape, Batch, KvCache, LayerSpec, Logits, Result, Rope, Step, silu_mul,
};

/// Tokens that go through a feed-forward block at a time, on the CPU and on other devices: its inner
/// activations, several times wider than the model, never exist for the whole of a long prompt.
const FEED_FORWARD_TOKENS: (usize, usize) = (1024, 8192);

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
    rope: Arc<Rope>,
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
        let rope = Arc::new(rope);
        let inner = Inner { config, device, dtype, embedding, layers, norm, head, rope };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// A session on these weights: a [`CausalLm`](longctx_core::CausalLm) whose layers remember
    /// through caches that `make` builds, one per layer. Queries and keys come to them before the
    /// rotary embedding, which each layer's [`LayerSpec`] holds.
    ///
    /// # Errors
    /// Whatever `make` reports; [`Error::Setting`](longctx_core::Error::Setting) for a cache that
    /// was made without the rotary embedding.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerSpec) -> Result<C>,
    ) -> Result<Decoder> {
        let layers = &self.inner.layers;
        let cache = |(index, layer): (usize, &Layer)| -> Result<Box<dyn KvCache>> {
            let spec = LayerSpec::new(layer.shape).with_rope(self.inner.rope.clone());
            Ok(Box::new(make(&spec.at(index, layers.len()))?))
        };
        Decoder::new(self.clone(), layers.iter().enumerate().map(cache).collect::<Result<_>>()?)
    }

    /// Logits of a batch whose ids are checked. After an error, some of the caches have advanced.
    pub(crate) fn forward(
        &self,
        caches: &mut [Box<dyn KvCache>],
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
    ) -> Result<Tensor> {
        let Inner { config, device, dtype, embedding, layers, norm, head, .. } = &*self.inner;
        let mut x = embedding.embed(&Tensor::new(ids, device)?, *dtype)?;
        for (layer, cache) in layers.iter().zip(caches) {
            x = layer.forward(&x, cache.as_mut(), batch, config.norm_eps)?;
        }
        if logits == Logits::Last && batch.tokens() > batch.seqs().len() {
            let last: Vec<_> = batch.cu_seqlens()[1..].iter().map(|&end| end as u32 - 1).collect();
            x = x.index_select(&Tensor::new(last, device)?, 0)?;
        }
        let x = rms_norm(&x, norm, config.norm_eps as f32)?;
        Ok(head.as_ref().unwrap_or(embedding).forward(&x)?.to_dtype(DType::F32)?)
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

    /// `x`: `[tokens, hidden]`, the tokens of all sequences of the batch.
    fn forward(
        &self,
        x: &Tensor,
        cache: &mut dyn KvCache,
        batch: &Batch,
        eps: f64,
    ) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attention_norm, eps as f32)?;
        let x = (x + self.attend(&normed, cache, batch, eps)?)?;
        let tokens = x.dim(0)?;
        let (on_cpu, elsewhere) = FEED_FORWARD_TOKENS;
        let of_part = if x.device().is_cpu() { on_cpu } else { elsewhere };
        let mut parts = Vec::new();
        for start in (0..tokens).step_by(of_part) {
            let part = x.narrow(0, start, of_part.min(tokens - start))?;
            let normed = rms_norm(&part, &self.feed_forward_norm, eps as f32)?;
            parts.push((part + self.feed_forward(&normed)?)?);
        }
        match parts.as_slice() {
            [one] => Ok(one.clone()),
            parts => Ok(Tensor::cat(parts, 0)?),
        }
    }

    fn attend(
        &self,
        x: &Tensor,
        cache: &mut dyn KvCache,
        batch: &Batch,
        eps: f64,
    ) -> Result<Tensor> {
        let AttentionShape { heads, head_dim, value_dim, .. } = self.shape;
        let tokens = batch.tokens();
        let mut qkv = self.qkv.forward_heads(x, head_dim)?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            qkv[0] = rms_norm(&qkv[0].contiguous()?, q_norm, eps as f32)?;
            qkv[1] = rms_norm(&qkv[1].contiguous()?, k_norm, eps as f32)?;
        }
        let out = cache.attend(&Step { batch, q: &qkv[0], k: &qkv[1], v: &qkv[2] })?;
        self.out.forward(&out.reshape((tokens, heads * value_dim))?)
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up.forward(x)?;
        self.down.forward(&silu_mul(&gate_up[0], &gate_up[1])?)
    }
}

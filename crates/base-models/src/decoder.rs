//! The decoder: Llama's layers, with the options of other architectures.

use std::path::Path;
use std::sync::Arc;

use crate::architectures;
use crate::config::Config;
use crate::folder::FolderWeights;
use crate::layer::{self, Layer, LayerInput, Projection, ResidualStream};
use crate::linear::Weight;
use crate::random::Random;
use crate::rope_settings::RopeSettings;
use crate::session::Session;
use crate::weights::{LoadOptions, Weights};
use candle_core::{DType, Device, Tensor};
use longctx_core::{Batch, Error, KvCache, LayerSpec, Logits, PostAttention, Result, Rope};

/// A decoder's weights, shared by all its sessions.
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
    /// The part after each layer's attention, for few tokens.
    after_attention: Vec<Option<PostAttention>>,
    norm: Tensor,
    /// `None` if the embedding matrix is the output head.
    head: Option<Weight>,
    /// The rotary embedding of each layer.
    ropes: Vec<Arc<Rope>>,
}

impl Transformer {
    /// Loads a folder with `config.json` and `model.safetensors` or its shards, without a
    /// tokenizer.
    ///
    /// # Errors
    /// As [`Pretrained::from_folder`](crate::Pretrained::from_folder).
    pub fn from_folder(folder: &Path, options: &LoadOptions) -> Result<Self> {
        let config = Config::from_folder(folder)?;
        let names = &architectures::of_folder(&config.family)?.folder_names;
        Self::load(config, &FolderWeights::open(folder, names, options)?, options)
    }

    /// Creates a model with random weights (matrices from N(0, 0.02²), norms 1, biases 0), for
    /// benchmarks without a checkpoint.
    ///
    /// # Errors
    /// If the configuration is invalid, or the device does not have enough memory.
    pub fn random(config: Config, options: &LoadOptions) -> Result<Self> {
        Self::load(config, &Random(options.clone()), options)
    }

    pub(crate) fn load(config: Config, w: &impl Weights, options: &LoadOptions) -> Result<Self> {
        config.check()?;
        let length = options.context_length.unwrap_or(config.context_length);
        let config = config.for_length(length);
        let names = w.names();
        let weight = |name: &str| format!("{name}.weight");
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = w.matrix(&weight(names.embedding), vocab, hidden)?;
        let head = match config.tied_embeddings {
            true => None,
            false => Some(w.matrix(&weight(names.head), vocab, hidden)?),
        };
        let layers: Vec<_> =
            (0..config.layers).map(|i| Layer::load(&config, i, w)).collect::<Result<_>>()?;
        let norm = layer::norm(&config, w, names.norm, hidden)?;
        let of_head = head.as_ref().unwrap_or(&embedding).dense();
        let of_head = of_head.map(|weight| Projection { norm: &norm, weight });
        let nexts = layers.iter().skip(1).map(Layer::projection).chain([of_head]);
        let after_attention = layers.iter().zip(nexts).map(|(layer, next)| match next {
            Some(next) => layer.post_attention(next),
            None => Ok(None),
        });
        let after_attention = after_attention.collect::<Result<_>>()?;
        let ropes = ropes(&config, w.rope_factors()?.as_deref())?;
        w.finish()?;
        let (device, dtype) = (options.device.clone(), options.dtype);
        let inner =
            Inner { config, device, dtype, embedding, layers, after_attention, norm, head, ropes };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the model's configuration.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Returns the model's device.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// Returns whether activations are f16 or bf16.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_half(&self) -> bool {
        matches!(self.inner.dtype, DType::F16 | DType::BF16)
    }

    /// Creates a session on these weights: a [`CausalLm`](longctx_core::CausalLm) with the caches
    /// that `make` creates, one per layer. The caches apply the rotary embedding of the layer's
    /// [`LayerSpec`] to queries and keys.
    ///
    /// # Errors
    /// Errors of `make`; [`Error::Setting`] for a cache that was created without the rotary
    /// embedding.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerSpec) -> Result<C>,
    ) -> Result<Session> {
        let layers = &self.inner.layers;
        let cache = |(index, layer): (usize, &Layer)| -> Result<Box<dyn KvCache>> {
            let spec = LayerSpec::new(layer.shape).with_rope(self.inner.ropes[index].clone());
            let spec = match self.inner.config.latent {
                Some(_) => spec.with_latent()?,
                None => spec,
            };
            Ok(Box::new(make(&spec.at(index, layers.len()))?))
        };
        Session::new(self.clone(), layers.iter().enumerate().map(cache).collect::<Result<_>>()?)
    }

    /// Returns the output of one layer's feed-forward block for its normalised input, both
    /// `[tokens, hidden]`. For benchmarks of the block.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no such layer, or `x` has
    /// another shape.
    pub fn feed_forward(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let Inner { config, layers, .. } = &*self.inner;
        let Some(layer) = layers.get(layer) else {
            return Err(Error::mismatch("layer", format!("one of {}", layers.len()), layer));
        };
        match x.dims() {
            &[tokens, hidden] if tokens > 0 && hidden == config.hidden_size => {
                layer.feed_forward(x)
            }
            dims => {
                let expected = format!("[tokens, {}]", config.hidden_size);
                Err(Error::mismatch("x of the feed-forward block", expected, format!("{dims:?}")))
            }
        }
    }

    /// Returns the logits of a batch whose ids `[tokens]` (u32) have been checked. After an error, some
    /// of the caches have advanced.
    pub(crate) fn forward(
        &self,
        caches: &mut [Box<dyn KvCache>],
        batch: &Batch,
        ids: &Tensor,
        logits: Logits,
    ) -> Result<Tensor> {
        let Inner { config, device, dtype, embedding, layers, after_attention, norm, head, .. } =
            &*self.inner;
        let mut x = embedding.embed(ids, *dtype)?;
        if config.embedding_scale != 1.0 {
            x = (x * config.embedding_scale)?;
        }
        let mut input = LayerInput::Stream(ResidualStream { x, y: None });
        let selected = logits == Logits::Last && batch.tokens() > batch.seqs().len();
        let few = batch.tokens() <= PostAttention::MAX_TOKENS;
        let head = head.as_ref().unwrap_or(embedding);
        let parts = layers.iter().zip(after_attention).zip(caches);
        for (index, ((layer, after), cache)) in parts.enumerate() {
            // The logits of selected tokens only are computed below.
            let wanted = few && !(selected && index + 1 == layers.len());
            let after = after.as_ref().filter(|_| wanted);
            input = layer.forward(input, after, cache.as_mut(), batch)?;
        }
        let x = match input {
            LayerInput::Projected(_, logits) => logits,
            LayerInput::Stream(mut x) => {
                if selected {
                    let last = batch.cu_seqlens()[1..].iter().map(|&end| end as u32 - 1);
                    x = x.select(&Tensor::new(last.collect::<Vec<_>>(), device)?)?;
                }
                let (_, x) = x.add_and_norm(Some(norm), config.norm_eps as f32)?;
                head.forward(&x)?
            }
        };
        let x = x.to_dtype(DType::F32)?;
        let x = if config.logit_scale == 1.0 { x } else { (x * config.logit_scale)? };
        Ok(match config.logit_soft_cap {
            Some(cap) => ((x / cap)?.tanh()? * cap)?,
            None => x,
        })
    }

    /// Returns the longest sequence that the rotary embeddings support; `None` if there is no
    /// limit.
    pub(crate) fn longest_sequence(&self) -> Option<usize> {
        let Config { rope, windowed_rope, .. } = self.config();
        let ropes = std::iter::once(rope).chain(windowed_rope);
        ropes.filter_map(|rope| rope.scaling.longest()).min()
    }
}

/// Returns the rotary embedding of each layer. Layers with equal settings share one.
fn ropes(config: &Config, factors: Option<&[f64]>) -> Result<Vec<Arc<Rope>>> {
    let mut made: Vec<(Option<&RopeSettings>, Arc<Rope>)> = Vec::new();
    let mut of_layer = |layer| -> Result<Arc<Rope>> {
        let settings = config.layer_rope(layer);
        if let Some((_, rope)) = made.iter().find(|(known, _)| *known == settings) {
            return Ok(rope.clone());
        }
        let rope = match settings {
            None => Rope::identity(config.head_dim),
            Some(settings) => {
                let rope = settings.rope(config.head_dim)?;
                match factors {
                    Some(factors) => rope.with_factors(factors)?,
                    None => rope,
                }
            }
        };
        made.push((settings, Arc::new(rope)));
        Ok(made[made.len() - 1].1.clone())
    };
    (0..config.layers).map(&mut of_layer).collect()
}

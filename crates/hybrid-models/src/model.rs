//! The models: residual blocks over a token embedding, whatever their mixers and wherever they compute.

use std::sync::Arc;

use crate::host::Host;
use crate::outline::Outline;
use crate::session::Session;
use candle_core::Device;
use longctx_core::{Error, KvCache, LayerSpec, Result};

/// A model's weights, shared by all sessions that run on them.
#[derive(Debug, Clone)]
pub struct Model {
    pub(crate) outline: Arc<Outline>,
    pub(crate) weights: Weights,
}

/// A model's weights, where it computes.
#[derive(Debug, Clone)]
pub(crate) enum Weights {
    Host(Arc<Host>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<crate::cuda::OnDevice>),
}

impl Model {
    /// Moves weights to where they are to compute.
    pub(crate) fn new(host: Host, device: &Device) -> Result<Self> {
        let outline = Arc::new(host.outline());
        let weights = match device {
            Device::Cpu => Weights::Host(Arc::new(host)),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                Weights::Cuda(Arc::new(crate::cuda::OnDevice::new(host, device)?))
            }
            other => {
                let place = format!("{:?}", other.location());
                let feature =
                    if cfg!(feature = "cuda") { "" } else { " without the feature `cuda`" };
                return Err(Error::Unsupported(format!("recurrent models on {place}{feature}")));
            }
        };
        Ok(Self { outline, weights })
    }

    /// The family's name: "mamba", "mamba2", "recurrent_gemma", "rwkv4" to "rwkv7", "hybrid".
    pub fn family(&self) -> &str {
        self.outline.family
    }

    /// Channels between layers.
    pub fn hidden_size(&self) -> usize {
        self.outline.hidden
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.outline.layers
    }

    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.outline.vocab
    }

    /// The tokens that end a text, as far as the checkpoint says.
    pub fn eos(&self) -> &[u32] {
        &self.outline.eos
    }

    /// Whether there are attention layers, which remember through caches.
    pub fn has_attention(&self) -> bool {
        self.outline.caches().next().is_some()
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        match &self.weights {
            Weights::Host(_) => &Device::Cpu,
            #[cfg(feature = "cuda")]
            Weights::Cuda(model) => model.device(),
        }
    }

    /// A session on these weights: a [`CausalLm`](longctx_core::CausalLm) with a state for each
    /// sequence. `make` builds the cache of each attention layer, where there are any. Queries and
    /// keys come to it before the rotary embedding, which the layer's [`LayerSpec`] holds.
    ///
    /// # Errors
    /// Whatever `make` reports; [`Error::Setting`] for a cache that was made without the rotary
    /// embedding.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerSpec) -> Result<C>,
    ) -> Result<Session> {
        let cache = |spec| -> Result<Box<dyn KvCache>> {
            let cache = make(spec)?;
            if cache.spec().rope.is_none() {
                let name = format!("rope of layer {}'s cache", spec.index);
                return Err(Error::setting(name, "the layer's rotary embedding", "none"));
            }
            Ok(Box::new(cache))
        };
        let caches = self.outline.caches().map(cache).collect::<Result<_>>()?;
        Ok(Session::new(self.clone(), caches))
    }
}

//! Models: residual layers over a token embedding, with any mixers, on any device.

use std::sync::Arc;

use crate::host_model::HostModel;
use crate::model_spec::ModelSpec;
use crate::session::Session;
use candle_core::Device;
use longctx_core::{Error, KvCache, LayerSpec, Result};

/// The weights of a model, shared by all its sessions.
#[derive(Debug, Clone)]
pub struct Model {
    pub(crate) spec: Arc<ModelSpec>,
    pub(crate) weights: Weights,
}

/// The weights on the host or on a device.
#[derive(Debug, Clone)]
pub(crate) enum Weights {
    Host(Arc<HostModel>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<crate::cuda::OnDevice>),
}

impl Model {
    /// Moves weights to the device of the computation.
    pub(crate) fn new(host: HostModel, device: &Device) -> Result<Self> {
        let spec = Arc::new(host.spec());
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
        Ok(Self { spec, weights })
    }

    /// Returns the name of the model family: "mamba", "mamba2", "recurrent_gemma", "rwkv4" to
    /// "rwkv7", "hybrid".
    pub fn model_type(&self) -> &str {
        self.spec.family
    }

    /// Returns the hidden size.
    pub fn hidden_size(&self) -> usize {
        self.spec.hidden
    }

    /// Returns the number of layers.
    pub fn layers(&self) -> usize {
        self.spec.layers
    }

    /// Returns the size of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.spec.vocab
    }

    /// Returns the end-of-text tokens that the checkpoint names.
    pub fn eos(&self) -> &[u32] {
        &self.spec.eos
    }

    /// Returns whether there are attention layers, which use caches.
    pub fn has_attention(&self) -> bool {
        self.spec.caches().next().is_some()
    }

    /// Returns the device of the computation.
    pub fn device(&self) -> &Device {
        match &self.weights {
            Weights::Host(_) => &Device::Cpu,
            #[cfg(feature = "cuda")]
            Weights::Cuda(model) => model.device(),
        }
    }

    /// Creates a session on these weights: a [`CausalLm`](longctx_core::CausalLm) with a state for
    /// each sequence. `make` creates the cache of each attention layer, if there are any. The cache
    /// receives queries and keys before the rotary embedding, which is in the layer's
    /// [`LayerSpec`].
    ///
    /// # Errors
    /// Errors of `make`; [`Error::Setting`] for a cache that was made without the rotary embedding.
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
        let caches = self.spec.caches().map(cache).collect::<Result<_>>()?;
        Ok(Session::new(self.clone(), caches))
    }
}

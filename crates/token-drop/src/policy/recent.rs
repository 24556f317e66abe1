//! The newest tokens: a baseline. With sinks it is the selection of StreamingLLM: Xiao et al.,
//! arXiv 2309.17453.

use crate::{Budget, EvictionPolicy, LayerView, Needs, PolicyCache, Protected, Settings};
use candle_core::{DType, Tensor};
use longctx_core::{KvStore, LayerSpec, Result};

/// Keeps the newest tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Recent;

impl EvictionPolicy for Recent {
    fn needs(&self) -> Needs {
        Needs { positions: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        Ok(view.positions()?.to_dtype(DType::F32)?)
    }
}

impl<S: KvStore> PolicyCache<S, Recent> {
    /// Keeps the newest tokens and the first `sinks` tokens.
    ///
    /// With sinks this is StreamingLLM as implemented in kvpress: keys stay rotated at their
    /// original positions. [`StreamingLlm`](crate::StreamingLlm) assigns positions within the
    /// cache, as the paper does.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn recent(spec: LayerSpec, store: S, sinks: usize, budget: Budget) -> Result<Self> {
        let protected = Protected::sinks(sinks);
        Self::with_settings(spec, store, Recent, Settings { protected, ..Settings::new(budget) })
    }
}

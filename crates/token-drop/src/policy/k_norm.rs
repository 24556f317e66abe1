//! K-norm: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
//! arXiv 2406.11430.

use crate::{EvictionPolicy, LayerView, Needs};
use candle_core::Tensor;
use longctx_core::Result;

/// Keeps the keys with the smallest norm, which tend to receive the most attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct KNorm;

impl EvictionPolicy for KNorm {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        Ok(view.keys()?.sqr()?.sum(2)?.sqrt()?.neg()?)
    }
}

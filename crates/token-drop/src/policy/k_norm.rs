//! K-norm: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
//! arXiv 2406.11430.

use crate::{EvictionPolicy, HeadView, LayerView, Needs};
use candle_core::Tensor;
use longctx_core::Result;

/// Keeps the keys with the smallest norm, which tend to receive the most attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct KNorm;

impl EvictionPolicy for KNorm {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Tensor>> {
        let of_head = |head: &HeadView<'_>| Ok(head.keys()?.sqr()?.sum(1)?.sqrt()?.neg()?);
        view.heads.iter().map(of_head).collect()
    }
}

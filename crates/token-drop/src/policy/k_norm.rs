//! K-norm: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
//! arXiv 2406.11430.

use crate::{EvictionPolicy, LayerView, Needs};
use longctx_core::Result;

/// Keeps the keys of smallest norm, which tend to receive the most attention.
#[derive(Debug, Clone, Copy, Default)]
pub struct KNorm;

impl EvictionPolicy for KNorm {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Vec<f32>>> {
        let norm = |key: &[f32]| key.iter().map(|x| x * x).sum::<f32>().sqrt();
        let d = view.spec.shape.head_dim;
        let of_head = |keys: &[f32]| keys.chunks_exact(d).map(|key| -norm(key)).collect();
        Ok(view.heads.iter().map(|head| of_head(&head.keys)).collect())
    }
}

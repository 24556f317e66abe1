//! KeyDiff: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
//! Inference", arXiv 2504.15364.

use crate::{EvictionPolicy, LayerView, Needs};
use longctx_core::Result;

/// Keeps the keys that are least like the others: those at the largest angle to the mean direction
/// of all.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeyDiff;

impl EvictionPolicy for KeyDiff {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Vec<f32>>> {
        let d = view.spec.shape.head_dim;
        let of_head = |keys: &[f32]| {
            let mut mean = vec![0.0; d];
            for key in keys.chunks_exact(d) {
                let length = norm(key);
                mean.iter_mut().zip(key).for_each(|(sum, x)| *sum += x / length);
            }
            let length = norm(&mean);
            let likeness = |key: &[f32]| dot(key, &mean) / (norm(key) * length);
            keys.chunks_exact(d).map(|key| -likeness(key)).collect()
        };
        Ok(view.heads.iter().map(|head| of_head(&head.keys)).collect())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Never zero, so that a key of zeros has no direction rather than one of NaN.
fn norm(x: &[f32]) -> f32 {
    dot(x, x).sqrt().max(1e-12)
}

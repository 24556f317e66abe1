//! KeyDiff: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
//! Inference", arXiv 2504.15364.

use crate::{EvictionPolicy, LayerView, Needs};
use candle_core::Tensor;
use longctx_core::Result;

/// Keeps the keys that are least similar to the others: those with the largest angle to the mean
/// direction of all keys.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeyDiff;

impl EvictionPolicy for KeyDiff {
    fn needs(&self) -> Needs {
        Needs { keys: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let keys = view.keys()?;
        let directions = keys.broadcast_div(&norms(keys)?)?;
        let mean = directions.sum_keepdim(1)?;
        let mean = mean.broadcast_div(&norms(&mean)?)?;
        Ok(directions.broadcast_mul(&mean)?.sum(2)?.neg()?)
    }
}

/// Returns the norms of rows. They are at least a small positive number, so that the direction of a
/// zero key is zero instead of NaN.
fn norms(x: &Tensor) -> Result<Tensor> {
    Ok(x.sqr()?.sum_keepdim(2)?.sqrt()?.maximum(1e-12)?)
}

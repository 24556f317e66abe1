//! Helpers of policies that observe the newest queries or keep sinks.

use crate::LayerView;
use candle_core::{DType, Tensor};
use longctx_core::{Error, Result};

pub fn check_window(window: usize) -> Result<()> {
    match window {
        0 => Err(Error::setting("window", "at least 1 query", 0)),
        _ => Ok(()),
    }
}

/// Returns the same score for all entries, on the device of `like`.
pub fn equal_scores(view: &LayerView<'_>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::ones((view.kv_heads.len(), view.entries), DType::F32, like.device())?)
}

/// Returns, for `count` entries of each head, a score above all scores `[kv_heads, entries]`.
/// Scores are not negative.
pub fn max_plus_one(scores: &Tensor, count: usize) -> Result<Tensor> {
    let max = (scores.flatten_all()?.max_keepdim(0)? + 1.0)?;
    Ok(max.unsqueeze(0)?.broadcast_as((scores.dim(0)?, count))?.contiguous()?)
}

/// Extends scores `[kv_heads, older entries]` to all entries, with a score above all others for the
/// tokens of the observation window.
pub fn protect_newest(scores: &Tensor, view: &LayerView<'_>) -> Result<Tensor> {
    match view.entries - scores.dim(1)? {
        0 => Ok(scores.contiguous()?),
        own => Ok(Tensor::cat(&[scores, &max_plus_one(scores, own)?], 1)?),
    }
}

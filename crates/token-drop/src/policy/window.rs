//! Helpers of policies that observe the newest queries.

use crate::HeadView;
use candle_core::{DType, Device, Tensor};
use longctx_core::{Error, Result};

pub fn check_window(window: usize) -> Result<()> {
    match window {
        0 => Err(Error::setting("window", "at least 1 query", 0)),
        _ => Ok(()),
    }
}

/// Returns a score above those of all heads. Scores are not negative.
pub fn above(scores: &[Tensor]) -> Result<Tensor> {
    let some: Vec<_> = scores.iter().filter(|scores| scores.elem_count() > 0).collect();
    match some.as_slice() {
        [] => Ok(Tensor::ones(1, DType::F32, &Device::Cpu)?),
        some => Ok((Tensor::cat(some, 0)?.max_keepdim(0)? + 1.0)?),
    }
}

/// Extends each head's scores to all its entries with a score above all others, for the tokens of
/// the observation window.
pub fn end_with(scores: Vec<Tensor>, heads: &[HeadView<'_>]) -> Result<Vec<Tensor>> {
    let most = above(&scores)?;
    let lengthen = |(scores, head): (Tensor, &HeadView<'_>)| {
        let own = head.positions.len() - scores.elem_count();
        if own == 0 {
            return Ok(scores);
        }
        cat(&[&scores, &most.to_device(scores.device())?.broadcast_as(own)?.contiguous()?])
    };
    scores.into_iter().zip(heads).map(lengthen).collect()
}

/// Concatenates lists, some of which may be empty.
pub fn cat(parts: &[&Tensor]) -> Result<Tensor> {
    let some: Vec<_> = parts.iter().filter(|part| part.elem_count() > 0).copied().collect();
    match some.as_slice() {
        [] => Ok(parts[0].clone()),
        some => Ok(Tensor::cat(some, 0)?),
    }
}

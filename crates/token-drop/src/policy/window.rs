//! What policies that observe the newest queries share.

use crate::HeadView;
use longctx_core::{Error, Result};

pub fn check_window(window: usize) -> Result<()> {
    match window {
        0 => Err(Error::setting("window", "at least 1 query", 0)),
        _ => Ok(()),
    }
}

/// Lengthens each list to its head's entries with a score above all others, for the window's own
/// tokens.
pub fn end_with(mut scores: Vec<Vec<f32>>, heads: &[HeadView<'_>]) -> Vec<Vec<f32>> {
    let most = scores.iter().flatten().copied().fold(0.0, f32::max) + 1.0;
    for (list, head) in scores.iter_mut().zip(heads) {
        list.resize(head.positions.len(), most);
    }
    scores
}

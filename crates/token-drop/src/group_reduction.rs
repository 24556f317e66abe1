//! Reduces the scores of the query heads of a group to scores of their kv head.

use candle_core::Tensor;
use longctx_core::{Result, RowReduction};

/// How the scores of the query heads of a group are reduced (GQA).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupReduction {
    /// The mean.
    #[default]
    Mean,
    /// The maximum.
    Max,
}

impl GroupReduction {
    /// Reduces `[kv_heads, group, entries]` to `[kv_heads, entries]`.
    pub(crate) fn reduce(self, heads: &Tensor) -> Result<Tensor> {
        Ok(match self {
            GroupReduction::Mean => heads.mean(1)?,
            GroupReduction::Max => heads.max(1)?,
        })
    }

    /// Returns the same reduction for scores on a device.
    pub(crate) fn of_rows(self) -> RowReduction {
        match self {
            GroupReduction::Mean => RowReduction::Mean,
            GroupReduction::Max => RowReduction::Max,
        }
    }

    /// Reduces lists of equal length, one per query head.
    pub(crate) fn reduce_lists(self, heads: &[Vec<f32>]) -> Vec<f32> {
        let Some((first, others)) = heads.split_first() else { return Vec::new() };
        let mut joined = first.clone();
        for head in others {
            for (x, &y) in joined.iter_mut().zip(head) {
                *x = match self {
                    GroupReduction::Mean => *x + y,
                    GroupReduction::Max => x.max(y),
                };
            }
        }
        if self == GroupReduction::Mean {
            let count = heads.len() as f32;
            joined.iter_mut().for_each(|x| *x /= count);
        }
        joined
    }
}

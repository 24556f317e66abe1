//! Scores of a sequence's entries.

use candle_core::{Device, Tensor};
use longctx_core::{Result, Selection};
use std::borrow::Cow;
use std::ops::Range;

/// Scores of the entries of a layer's kv heads.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Scores {
    /// `[kv_heads, entries]`, f32, on a CUDA device.
    OnDevice(Tensor),
    /// One list per kv head.
    Lists(Vec<Vec<f32>>),
}

impl Scores {
    /// Creates scores from those of consecutive kv heads, `[heads, entries]` each. They stay on a
    /// CUDA device if all heads hold the same number of entries.
    pub fn new(runs: Vec<Tensor>) -> Result<Self> {
        if let [all] = runs.as_slice()
            && all.device().is_cuda()
        {
            return Ok(Self::OnDevice(all.clone()));
        }
        let mut lists = Vec::new();
        for run in &runs {
            lists.extend(run.to_vec2::<f32>()?);
        }
        Ok(Self::Lists(lists))
    }

    /// Returns one list per kv head. Waits for the device if they are there.
    pub fn lists(&self) -> Result<Cow<'_, [Vec<f32>]>> {
        match self {
            Self::OnDevice(all) => Ok(Cow::Owned(all.to_vec2()?)),
            Self::Lists(lists) => Ok(Cow::Borrowed(lists)),
        }
    }

    /// Keeps the scores of the selected entries.
    pub fn retain(&mut self, keep: &Selection) -> Result<()> {
        let kept = |(scores, keep): (&Vec<f32>, &Vec<u32>)| {
            keep.iter().map(|&entry| scores[entry as usize]).collect()
        };
        *self = Self::Lists(self.lists()?.iter().zip(keep.heads()?).map(kept).collect());
        Ok(())
    }

    /// Returns the scores of some kv heads that hold the same number of entries, `[heads,
    /// entries]`.
    pub fn of_heads(&self, heads: Range<usize>, device: &Device) -> Result<Tensor> {
        match self {
            Self::OnDevice(all) => Ok(all.narrow(0, heads.start, heads.len())?),
            Self::Lists(lists) => {
                let lists = &lists[heads];
                let len = lists.first().map_or(0, Vec::len);
                Ok(Tensor::from_vec(lists.concat(), (lists.len(), len), device)?)
            }
        }
    }

    pub fn bytes(&self) -> usize {
        let numbers = match self {
            Self::OnDevice(all) => all.elem_count(),
            Self::Lists(lists) => lists.iter().map(Vec::capacity).sum(),
        };
        numbers * size_of::<f32>()
    }
}

//! Metadata of the entries of a sequence: positions and carried scores.

use crate::scores::Scores;
use candle_core::{DType, Device, Tensor};
use longctx_core::{KeptEntries, Result, Selection};
use std::ops::Range;
use std::sync::Arc;

/// Positions of a sequence's entries per kv head, and the scores carried from call to call.
#[derive(Debug, Clone)]
pub struct EntryMetadata {
    kv_heads: usize,
    /// Positions of the entries kept by the last eviction.
    kept: Positions,
    /// Positions of the tokens since then, which every head holds.
    newer: Range<usize>,
    /// Scores of the entries at the time of scoring. `None` unless the policy uses its previous
    /// scores.
    scores: Option<Scores>,
}

#[derive(Debug, Clone)]
enum Positions {
    /// One list per kv head.
    Lists(Vec<Vec<u32>>),
    /// `[kv_heads, entries]`, u32, on a CUDA device. Forks share it.
    OnDevice(Arc<Tensor>),
}

/// The metadata of entries selected on a CUDA device.
#[derive(Debug)]
pub struct Kept {
    /// `[kv_heads, entries]`, u32.
    pub positions: Tensor,
    /// `[kv_heads, entries]`, f32.
    pub scores: Tensor,
}

impl EntryMetadata {
    pub fn new(kv_heads: usize) -> Self {
        let kept = Positions::Lists(vec![Vec::new(); kv_heads]);
        Self { kv_heads, kept, newer: 0..0, scores: None }
    }

    /// Appends tokens to every head. `positions` follow the previous ones.
    pub fn add(&mut self, positions: Range<usize>) {
        let start = if self.newer.is_empty() { positions.start } else { self.newer.start };
        self.newer = start..positions.end;
    }

    /// Drops the newest `count` entries of each head, all of them newer than the last eviction.
    pub fn drop_newest(&mut self, count: usize) {
        self.newer.end = self.newer.end.saturating_sub(count).max(self.newer.start);
    }

    /// Sets the scores to carry to the next call.
    pub fn set_scores(&mut self, scores: Scores) {
        self.scores = Some(scores);
    }

    /// Keeps the selected entries. `kept` has their positions and scores if they were selected on a
    /// device.
    pub fn retain(&mut self, keep: &Selection, kept: Option<Kept>) -> Result<()> {
        match kept {
            Some(kept) => {
                let scores = self.scores.is_some().then_some(kept.scores);
                self.keep_on_device(kept.positions, scores);
            }
            None => {
                let mut lists = self.positions()?;
                for (positions, keep) in lists.iter_mut().zip(keep.heads()?) {
                    *positions = keep.iter().map(|&entry| positions[entry as usize]).collect();
                }
                self.kept = Positions::Lists(lists);
                self.scores.as_mut().map_or(Ok(()), |scores| scores.retain(keep))?;
                self.newer = self.newer.end..self.newer.end;
            }
        }
        Ok(())
    }

    /// Keeps the entries at these positions, `[kv_heads, entries]` in u32, with the scores to carry
    /// to the next call. Returns the entries that they replace, unless they are on the host or a
    /// fork shares them.
    pub fn keep_on_device(
        &mut self,
        positions: Tensor,
        scores: Option<Tensor>,
    ) -> Option<KeptEntries> {
        self.newer = self.newer.end..self.newer.end;
        let scores = std::mem::replace(&mut self.scores, scores.map(Scores::OnDevice));
        let kept = Positions::OnDevice(Arc::new(positions));
        let Positions::OnDevice(positions) = std::mem::replace(&mut self.kept, kept) else {
            return None;
        };
        let scores = match scores {
            Some(Scores::OnDevice(scores)) => Some(scores),
            _ => None,
        };
        Some(KeptEntries { positions: Arc::into_inner(positions)?, scores })
    }

    /// Returns the device of the positions and scores; `None` if some are on the host.
    pub fn device(&self) -> Option<&Device> {
        let on_device = self.scores.as_ref().is_none_or(|of| matches!(of, Scores::OnDevice(_)));
        match &self.kept {
            Positions::OnDevice(kept) if on_device => Some(kept.device()),
            _ => None,
        }
    }

    /// Returns the positions of heads with equal numbers of entries that the last eviction kept,
    /// `[heads, entries]`; `None` if there are none. Also returns the position of the next
    /// entry. Later ones follow it.
    pub fn kept_positions(&self, device: &Device) -> Result<(Option<Tensor>, u32)> {
        let kept = match &self.kept {
            Positions::OnDevice(kept) => Some(kept.as_ref().clone()),
            Positions::Lists(lists) if lists[0].is_empty() => None,
            Positions::Lists(lists) => {
                let dims = (self.kv_heads, lists[0].len());
                Some(Tensor::from_vec(lists.concat(), dims, device)?)
            }
        };
        Ok((kept, self.newer.start as u32))
    }

    /// Returns the number of entries of each head, `[kv_heads]`.
    pub fn lens(&self) -> Vec<usize> {
        let newer = self.newer.len();
        match &self.kept {
            Positions::Lists(lists) => lists.iter().map(|kept| kept.len() + newer).collect(),
            Positions::OnDevice(kept) => vec![kept.dims()[1] + newer; self.kv_heads],
        }
    }

    /// Returns the positions, one list per kv head. Waits for the device if they are there.
    pub fn positions(&self) -> Result<Vec<Vec<u32>>> {
        let mut lists = match &self.kept {
            Positions::Lists(lists) => lists.clone(),
            Positions::OnDevice(kept) => kept.to_vec2()?,
        };
        for positions in &mut lists {
            positions.extend(self.newer.clone().map(|position| position as u32));
        }
        Ok(lists)
    }

    /// Returns the positions of heads with equal numbers of entries, `[heads, entries]` in u32.
    pub fn positions_of(&self, heads: Range<usize>, device: &Device) -> Result<Tensor> {
        let count = heads.len();
        let kept = match &self.kept {
            Positions::OnDevice(kept) => kept.narrow(0, heads.start, count)?,
            Positions::Lists(lists) => {
                let lists = &lists[heads];
                Tensor::from_vec(lists.concat(), (count, lists[0].len()), device)?
            }
        };
        if self.newer.is_empty() {
            return Ok(kept);
        }
        let newer = Tensor::arange(self.newer.start as u32, self.newer.end as u32, device)?;
        let newer = newer.unsqueeze(0)?.repeat((count, 1))?;
        match kept.elem_count() {
            0 => Ok(newer),
            _ => Ok(Tensor::cat(&[&kept.to_dtype(DType::U32)?, &newer], 1)?),
        }
    }

    /// Returns the carried scores of heads with equal numbers of entries, `[heads, entries]`,
    /// without those of newer tokens; `None` before the first call.
    pub fn scores(&self, heads: Range<usize>, device: &Device) -> Result<Option<Tensor>> {
        self.scores.as_ref().map(|scores| scores.of_heads(heads, device)).transpose()
    }

    pub fn bytes(&self) -> usize {
        let positions = match &self.kept {
            Positions::Lists(lists) => lists.iter().map(Vec::capacity).sum(),
            Positions::OnDevice(kept) => kept.elem_count(),
        };
        positions * size_of::<u32>() + self.scores.as_ref().map_or(0, Scores::bytes)
    }
}

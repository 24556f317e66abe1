//! Metadata of entries besides keys and values.

use longctx_core::Selection;
use std::ops::Range;

/// Positions, and scores carried from call to call, of one sequence's kv heads.
#[derive(Debug, Clone)]
pub struct Entries {
    positions: Vec<Vec<u32>>,
    /// Empty unless the policy uses its previous scores.
    scores: Vec<Vec<f32>>,
}

impl Entries {
    pub fn new(kv_heads: usize) -> Self {
        Self { positions: vec![Vec::new(); kv_heads], scores: Vec::new() }
    }

    /// Adds the tokens at `positions` to every head.
    pub fn add(&mut self, positions: Range<usize>) {
        for head in &mut self.positions {
            head.extend(positions.clone().map(|p| p as u32));
        }
        for scores in &mut self.scores {
            scores.resize(scores.len() + positions.len(), 0.0);
        }
    }

    /// Removes each head's newest `count` entries.
    pub fn drop_newest(&mut self, count: usize) {
        self.positions.iter_mut().for_each(|head| head.truncate(head.len() - count));
        self.scores.iter_mut().for_each(|head| head.truncate(head.len() - count));
    }

    /// Stores scores for the next call; `[kv_heads]` lists, one score per entry.
    pub fn carry(&mut self, scores: Vec<Vec<f32>>) {
        self.scores = scores;
    }

    pub fn retain(&mut self, keep: &Selection) {
        retain(&mut self.positions, keep);
        retain(&mut self.scores, keep);
    }

    pub fn lens(&self) -> Vec<usize> {
        self.positions.iter().map(Vec::len).collect()
    }

    pub fn positions(&self) -> &[Vec<u32>] {
        &self.positions
    }

    /// Returns the carried scores of one head; empty before the first scoring.
    pub fn scores(&self, head: usize) -> &[f32] {
        self.scores.get(head).map_or(&[], Vec::as_slice)
    }

    pub fn bytes(&self) -> usize {
        let positions: usize = self.positions.iter().map(Vec::capacity).sum();
        let scores: usize = self.scores.iter().map(Vec::capacity).sum();
        positions * size_of::<u32>() + scores * size_of::<f32>()
    }
}

fn retain<T: Copy>(heads: &mut [Vec<T>], keep: &Selection) {
    for (head, keep) in heads.iter_mut().zip(keep.heads()) {
        if keep.len() < head.len() {
            *head = keep.iter().map(|&entry| head[entry as usize]).collect();
        }
    }
}

//! What a cache remembers of each entry beside its key and value.

use longctx_core::Selection;
use std::ops::Range;

/// Positions, and scores that are carried from call to call, of each batch entry's kv heads.
#[derive(Debug, Default)]
pub struct Ledger {
    positions: Vec<Vec<u32>>,
    /// Empty unless the policy builds on its earlier scores.
    scores: Vec<Vec<f32>>,
}

impl Ledger {
    /// Tokens at `positions` come to each of `heads` heads.
    pub fn add(&mut self, heads: usize, positions: Range<usize>) {
        self.positions.resize(heads, Vec::new());
        for head in &mut self.positions {
            head.extend(positions.clone().map(|p| p as u32));
        }
        for scores in &mut self.scores {
            scores.resize(scores.len() + positions.len(), 0.0);
        }
    }

    /// Scores to go on from; `[heads]` lists as long as the heads.
    pub fn carry(&mut self, scores: Vec<Vec<f32>>) {
        self.scores = scores;
    }

    pub fn retain(&mut self, keep: &Selection) {
        retain(&mut self.positions, keep);
        if !self.scores.is_empty() {
            retain(&mut self.scores, keep);
        }
    }

    pub fn heads(&self) -> usize {
        self.positions.len()
    }

    pub fn lens(&self) -> Vec<usize> {
        self.positions.iter().map(Vec::len).collect()
    }

    pub fn positions(&self) -> &[Vec<u32>] {
        &self.positions
    }

    /// The carried scores of one head; none before the first.
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

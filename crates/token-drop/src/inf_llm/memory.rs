//! The past in blocks: what represents each, which are fetched, and which are resident.

use crate::rows::Rows;
use longctx_core::attention::Element;

/// One batch entry's blocks, oldest first.
#[derive(Debug)]
pub struct Memory<T> {
    pub blocks: Vec<Rows<T>>,
    /// For each block, each query head's mean representative key: `[blocks, heads * head_dim]`.
    representatives: Vec<f32>,
    /// Resident blocks and the fetch that last asked for each, in the order in which they became resident.
    resident: Vec<(usize, u64)>,
    fetches: u64,
}

impl<T: Element> Memory<T> {
    pub fn new() -> Self {
        Self { blocks: Vec::new(), representatives: Vec::new(), resident: Vec::new(), fetches: 0 }
    }

    /// Adds a block of unrotated keys. `scores` (one list per query head, one number per token) say which `count` tokens represent it.
    pub fn add(&mut self, block: Rows<T>, scores: &[&[f32]], count: usize) {
        let group = scores.len() / block.heads();
        for (head, scores) in scores.iter().enumerate() {
            let keys = block.whole(head / group).keys;
            let d = keys.len() / scores.len();
            let mut order: Vec<_> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let mut mean = vec![0.0; d];
            let mut scratch = Vec::new();
            for &token in &order[..count] {
                let key = T::widen(&keys[token * d..(token + 1) * d], &mut scratch);
                mean.iter_mut().zip(key).for_each(|(sum, x)| *sum += x / count as f32);
            }
            self.representatives.extend(mean);
        }
        self.blocks.push(block);
    }

    /// The `count` blocks whose representatives have the largest product with the query (`[heads * head_dim]`), the best first.
    pub fn choose(&self, query: &[f32], count: usize) -> Vec<usize> {
        let mut order: Vec<_> = (0..self.blocks.len()).collect();
        if order.len() > count {
            let likeness = |block: &[f32]| block.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
            let scores: Vec<_> =
                self.representatives.chunks_exact(query.len()).map(likeness).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            order.truncate(count);
        }
        order
    }

    /// Makes the chosen blocks resident. If there is no room for all, those that were asked for the longest ago leave, and of these the
    /// one that has been resident the longest.
    pub fn fetch(&mut self, chosen: &[usize], room: usize) {
        self.fetches += 1;
        for &block in chosen {
            match self.resident.iter_mut().find(|(resident, _)| *resident == block) {
                Some((_, last)) => *last = self.fetches,
                None => self.resident.push((block, self.fetches)),
            }
        }
        while self.resident.len() > room.max(chosen.len()) {
            let oldest = (0..self.resident.len()).min_by_key(|&i| self.resident[i].1);
            oldest.map(|i| self.resident.remove(i));
        }
    }

    /// In the order of the text.
    pub fn resident(&self) -> Vec<usize> {
        sorted(self.resident.iter().map(|&(block, _)| block))
    }

    /// What the last fetch asked for, in the order of the text.
    pub fn fetched(&self) -> Vec<usize> {
        let last = self.resident.iter().filter(|(_, last)| *last == self.fetches);
        sorted(last.map(|&(block, _)| block))
    }

    pub fn bookkeeping(&self) -> usize {
        size_of_val(&*self.representatives) + size_of_val(&*self.resident)
    }
}

fn sorted(blocks: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut blocks: Vec<_> = blocks.collect();
    blocks.sort_unstable();
    blocks
}

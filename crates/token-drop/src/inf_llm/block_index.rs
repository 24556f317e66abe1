//! The blocks of the past: representatives, retrieval and residency.

/// The blocks of one sequence, oldest first.
#[derive(Debug, Clone)]
pub struct BlockIndex {
    blocks: usize,
    /// The mean representative key of each block and query head: `[blocks, heads * head_dim]`.
    representatives: Vec<f32>,
    /// Resident blocks in the order in which they became resident, each with the number of its last
    /// retrieval.
    resident: Vec<(usize, u64)>,
    retrievals: u64,
}

impl BlockIndex {
    pub fn new() -> Self {
        Self { blocks: 0, representatives: Vec::new(), resident: Vec::new(), retrievals: 0 }
    }

    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Adds a block. `heads` has, for each query head, the unrotated keys `[tokens, head_dim]` of
    /// its kv head and the attention that each token received. The `count` tokens with the most
    /// attention represent the block.
    pub fn add<'a>(&mut self, heads: impl Iterator<Item = (&'a [f32], &'a [f32])>, count: usize) {
        for (keys, sums) in heads {
            let d = keys.len() / sums.len();
            let mut order: Vec<_> = (0..sums.len()).collect();
            order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]));
            let mut mean = vec![0.0; d];
            for &token in &order[..count] {
                let key = &keys[token * d..(token + 1) * d];
                mean.iter_mut().zip(key).for_each(|(sum, x)| *sum += x / count as f32);
            }
            self.representatives.extend(mean);
        }
        self.blocks += 1;
    }

    /// Returns the `count` blocks whose representatives have the largest product with the query
    /// (`[heads * head_dim]`), best first.
    pub fn select(&self, query: &[f32], count: usize) -> Vec<usize> {
        let mut order: Vec<_> = (0..self.blocks).collect();
        if order.len() > count {
            let score = |block: &[f32]| block.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
            let scores: Vec<_> =
                self.representatives.chunks_exact(query.len()).map(score).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            order.truncate(count);
        }
        order
    }

    /// Makes the selected blocks resident. If there is no room for all, the least recently
    /// retrieved blocks leave first, and among equals the one that has been resident the longest.
    pub fn make_resident(&mut self, selected: &[usize], capacity: usize) {
        self.retrievals += 1;
        for &block in selected {
            match self.resident.iter_mut().find(|(resident, _)| *resident == block) {
                Some((_, last)) => *last = self.retrievals,
                None => self.resident.push((block, self.retrievals)),
            }
        }
        while self.resident.len() > capacity.max(selected.len()) {
            let oldest = (0..self.resident.len()).min_by_key(|&i| self.resident[i].1);
            oldest.map(|i| self.resident.remove(i));
        }
    }

    /// Returns the resident blocks in text order.
    pub fn resident(&self) -> Vec<usize> {
        sorted(self.resident.iter().map(|&(block, _)| block))
    }

    /// Returns the blocks of the last retrieval in text order.
    pub fn retrieved(&self) -> Vec<usize> {
        let last = self.resident.iter().filter(|(_, last)| *last == self.retrievals);
        sorted(last.map(|&(block, _)| block))
    }

    pub fn bytes(&self) -> usize {
        self.representatives.capacity() * size_of::<f32>()
            + self.resident.capacity() * size_of::<(usize, u64)>()
    }
}

fn sorted(blocks: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut blocks: Vec<_> = blocks.collect();
    blocks.sort_unstable();
    blocks
}

//! The past in blocks: what represents each, which are fetched, and which are resident.

/// One sequence's blocks, oldest first.
#[derive(Debug, Clone)]
pub struct Memory {
    blocks: usize,
    /// For each block, each query head's mean representative key: `[blocks, heads * head_dim]`.
    representatives: Vec<f32>,
    /// Resident blocks and the fetch that last asked for each, in the order in which they became
    /// resident.
    resident: Vec<(usize, u64)>,
    fetches: u64,
}

impl Memory {
    pub fn new() -> Self {
        Self { blocks: 0, representatives: Vec::new(), resident: Vec::new(), fetches: 0 }
    }

    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Adds a block of unrotated keys: for each query head, the `[tokens, head_dim]` keys of its kv
    /// head and the attention that each token received, which says which `count` tokens represent
    /// the block.
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

    /// The `count` blocks whose representatives have the largest product with the query
    /// (`[heads * head_dim]`), the best first.
    pub fn choose(&self, query: &[f32], count: usize) -> Vec<usize> {
        let mut order: Vec<_> = (0..self.blocks).collect();
        if order.len() > count {
            let likeness = |block: &[f32]| block.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
            let scores: Vec<_> =
                self.representatives.chunks_exact(query.len()).map(likeness).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            order.truncate(count);
        }
        order
    }

    /// Makes the chosen blocks resident. If there is no room for all, those that were asked for the
    /// longest ago leave, and of these the one that has been resident the longest.
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

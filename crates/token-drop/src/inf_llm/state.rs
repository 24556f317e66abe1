//! The state of a sequence outside the stores.

use std::ops::Range;

use super::InfLlmSettings;
use super::block_index::BlockIndex;
use longctx_core::{Footprint, LayerSpec};

/// The parts of a text in order: first tokens, blocks, a remainder that has left the window but
/// does not fill a block, and the window.
#[derive(Debug, Clone)]
pub struct SeqState {
    pub sizes: InfLlmSettings,
    /// First tokens, which every query sees.
    init: usize,
    /// Tokens that have left the window.
    pub left_window: usize,
    pub blocks: BlockIndex,
    /// Attention that the tokens of the remainder and the window received, a list per query head.
    attention_sums: Vec<Vec<f32>>,
}

impl SeqState {
    pub fn new(sizes: InfLlmSettings, spec: &LayerSpec) -> Self {
        let sums = vec![Vec::new(); spec.shape.heads];
        Self { sizes, init: 0, left_window: 0, blocks: BlockIndex::new(), attention_sums: sums }
    }

    /// Sets new sizes for a longer prompt, after `seen` tokens. If there are blocks, the number of
    /// first tokens stays, and the window is enlarged by the difference. More blocks may leave a
    /// smaller window.
    pub fn resize(&mut self, sizes: InfLlmSettings, seen: usize) {
        let init = if self.blocks.len() > 0 { self.init } else { sizes.init };
        let local = (sizes.local + sizes.init).saturating_sub(init);
        self.sizes = InfLlmSettings { init, local, ..sizes };
        self.left_window = self.left_window.max(seen.saturating_sub(local));
    }

    /// Returns the number of tokens among the first tokens and in blocks.
    pub fn remainder_start(&self) -> usize {
        self.init + self.blocks.len() * self.sizes.block
    }

    /// Returns the token ranges of the first tokens, the selected blocks, and the remainder up to
    /// `end`.
    pub fn visible(&self, selected: &[usize], end: usize) -> Vec<Range<usize>> {
        let mut blocks = selected.to_vec();
        blocks.sort_unstable();
        let block = |i: usize| {
            let start = self.init + i * self.sizes.block;
            start..start + self.sizes.block
        };
        let first = std::iter::once(0..self.init);
        let rest = std::iter::once(self.remainder_start()..end);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for range in first.chain(blocks.into_iter().map(block)).chain(rest) {
            match ranges.last_mut() {
                _ if range.is_empty() => {}
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// Returns the tokens that leave the window when `end` tokens have been seen.
    pub fn leaving(&self, end: usize) -> Range<usize> {
        self.left_window..self.left_window.max(end.saturating_sub(self.sizes.local))
    }

    /// Adds `tokens` tokens.
    pub fn append(&mut self, tokens: usize) {
        self.attention_sums.iter_mut().for_each(|sums| sums.resize(sums.len() + tokens, 0.0));
    }

    /// Adds the attention that the tokens from `first` on received, a list per query head.
    pub fn add_attention(&mut self, first: usize, received: &[Vec<f32>]) {
        let remainder_start = self.remainder_start();
        for (sums, received) in self.attention_sums.iter_mut().zip(received) {
            let skip = remainder_start.saturating_sub(first);
            let sums_of_range = &mut sums[first + skip - remainder_start..];
            sums_of_range
                .iter_mut()
                .zip(&received[skip.min(received.len())..])
                .for_each(|(a, b)| *a += b);
        }
    }

    /// Moves tokens up to `left` out of the window and fills the first tokens. Returns the tokens
    /// of each newly filled block.
    pub fn leave_window(&mut self, left: usize) -> Vec<Range<usize>> {
        self.left_window = left;
        if self.blocks.len() == 0 && self.init < self.sizes.init {
            let count = (self.sizes.init - self.init).min(left - self.init);
            self.attention_sums.iter_mut().for_each(|sums| drop(sums.drain(..count)));
            self.init += count;
        }
        let (first, block) = (self.remainder_start(), self.sizes.block);
        (first..left).step_by(block).map(|i| i..i + block).filter(|b| b.end <= left).collect()
    }

    /// Makes a block of the oldest tokens of the remainder. `keys` holds their keys per kv head.
    pub fn add_block(&mut self, keys: &[Vec<f32>]) {
        let (block, group) = (self.sizes.block, self.attention_sums.len() / keys.len());
        let heads = self.attention_sums.iter().enumerate();
        let heads = heads.map(|(h, sums)| (keys[h / group].as_slice(), &sums[..block]));
        self.blocks.add(heads, self.sizes.representatives);
        self.attention_sums.iter_mut().for_each(|sums| drop(sums.drain(..block)));
    }

    /// Returns the number of tokens of the past, of `seen`, that an accelerator need not hold:
    /// blocks that are not resident, and the unrotated copies of the window.
    pub fn offloadable(&self, seen: usize) -> usize {
        let blocks = self.blocks.len() - self.blocks.resident().len();
        blocks * self.sizes.block + (seen - self.left_window)
    }

    pub fn footprint(&self) -> Footprint {
        let sums: usize = self.attention_sums.iter().map(Vec::capacity).sum();
        let bookkeeping = self.blocks.bytes() + sums * size_of::<f32>();
        Footprint { bookkeeping, ..Default::default() }
    }
}

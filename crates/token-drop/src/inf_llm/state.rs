//! The state of a sequence outside the stores.

use std::ops::Range;

use super::InfLlmSettings;
use super::memory::Memory;
use longctx_core::{Footprint, LayerSpec};

/// The parts of a text in order: first tokens, blocks, a remainder that has left the window but
/// does not fill a block, and the window.
#[derive(Debug, Clone)]
pub struct State {
    pub sizes: InfLlmSettings,
    /// First tokens, which every query sees.
    init: usize,
    /// Tokens that have left the window.
    pub left: usize,
    pub memory: Memory,
    /// Attention that the tokens of the remainder and the window received, a list per query head.
    sums: Vec<Vec<f32>>,
}

impl State {
    pub fn new(sizes: InfLlmSettings, spec: &LayerSpec) -> Self {
        let sums = vec![Vec::new(); spec.shape.heads];
        Self { sizes, init: 0, left: 0, memory: Memory::new(), sums }
    }

    /// Sets new sizes for a longer prompt, after `seen` tokens. If there are blocks, the number of
    /// first tokens stays, and the window is enlarged by the difference. More blocks may leave a
    /// smaller window.
    pub fn resize(&mut self, sizes: InfLlmSettings, seen: usize) {
        let init = if self.memory.len() > 0 { self.init } else { sizes.init };
        let local = (sizes.local + sizes.init).saturating_sub(init);
        self.sizes = InfLlmSettings { init, local, ..sizes };
        self.left = self.left.max(seen.saturating_sub(local));
    }

    /// Returns the number of tokens among the first tokens and in blocks.
    pub fn settled(&self) -> usize {
        self.init + self.memory.len() * self.sizes.block
    }

    /// Returns the token ranges of the first tokens, the chosen blocks, and the remainder up to
    /// `end`.
    pub fn visible(&self, chosen: &[usize], end: usize) -> Vec<Range<usize>> {
        let mut blocks = chosen.to_vec();
        blocks.sort_unstable();
        let block = |i: usize| {
            let start = self.init + i * self.sizes.block;
            start..start + self.sizes.block
        };
        let first = std::iter::once(0..self.init);
        let rest = std::iter::once(self.settled()..end);
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
        self.left..self.left.max(end.saturating_sub(self.sizes.local))
    }

    /// Adds `tokens` tokens.
    pub fn lengthen(&mut self, tokens: usize) {
        self.sums.iter_mut().for_each(|sums| sums.resize(sums.len() + tokens, 0.0));
    }

    /// Adds the attention that the tokens from `first` on received, a list per query head.
    pub fn note(&mut self, first: usize, received: &[Vec<f32>]) {
        let settled = self.settled();
        for (sums, received) in self.sums.iter_mut().zip(received) {
            let skip = settled.saturating_sub(first);
            let places = &mut sums[first + skip - settled..];
            places.iter_mut().zip(&received[skip.min(received.len())..]).for_each(|(a, b)| *a += b);
        }
    }

    /// Moves tokens up to `left` out of the window and fills the first tokens. Returns the tokens
    /// of each newly filled block.
    pub fn leave(&mut self, left: usize) -> Vec<Range<usize>> {
        self.left = left;
        if self.memory.len() == 0 && self.init < self.sizes.init {
            let wanted = (self.sizes.init - self.init).min(left - self.init);
            self.sums.iter_mut().for_each(|sums| drop(sums.drain(..wanted)));
            self.init += wanted;
        }
        let (first, block) = (self.settled(), self.sizes.block);
        (first..left).step_by(block).map(|i| i..i + block).filter(|b| b.end <= left).collect()
    }

    /// Makes a block of the oldest tokens of the remainder. `keys` holds their keys per kv head.
    pub fn add_block(&mut self, keys: &[Vec<f32>]) {
        let (block, group) = (self.sizes.block, self.sums.len() / keys.len());
        let heads = self.sums.iter().enumerate();
        let heads = heads.map(|(h, sums)| (keys[h / group].as_slice(), &sums[..block]));
        self.memory.add(heads, self.sizes.representatives);
        self.sums.iter_mut().for_each(|sums| drop(sums.drain(..block)));
    }

    /// Returns the number of tokens of the past, of `seen`, that an accelerator need not hold:
    /// blocks that are not resident, and the unrotated copies of the window.
    pub fn away(&self, seen: usize) -> usize {
        let blocks = self.memory.len() - self.memory.resident().len();
        blocks * self.sizes.block + (seen - self.left)
    }

    pub fn footprint(&self) -> Footprint {
        let sums: usize = self.sums.iter().map(Vec::capacity).sum();
        let bookkeeping = self.memory.bytes() + sums * size_of::<f32>();
        Footprint { bookkeeping, ..Default::default() }
    }
}

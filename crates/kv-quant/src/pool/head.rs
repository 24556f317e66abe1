//! One kv head of a sequence: block and page tables, and the validity mask.
//!
//! Appended tokens take *slots*, in order. The first slots are packed in blocks; the last ones are
//! in the residuals. An evicted entry leaves a hole in its block: its slot stays until the block is
//! freed. Entries are the slots that are not holes.

use std::ops::Range;

use super::memory::{BlockDelta, BlockLayout, PAGE, PoolMemory};
use super::residual::Residual;
use crate::Format;
use crate::layout::Line;
use crate::packed::PackedRef;

#[derive(Debug, Clone, Default)]
pub struct Head {
    pub blocks: Vec<u32>,
    /// Number of packed keys, including holes.
    pub packed_keys: usize,
    pub packed_values: usize,
    pub keys: Residual,
    pub values: Residual,
    /// Validity mask: a bit for each packed key, set while it is held; empty while there are no
    /// holes.
    pub validity: Vec<u32>,
    /// Number of entries.
    pub len: usize,
}

/// A head's counts after an append.
#[derive(Debug, Clone, Copy)]
pub struct Growth {
    pub packed_keys: usize,
    pub packed_values: usize,
    pub slots: usize,
    /// The first key in full precision.
    pub key_start: usize,
    pub value_start: usize,
}

/// A block and its fill level.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    layout: &'a BlockLayout,
    lines: &'a [Line],
    keys: usize,
    values: usize,
}

impl<'a> Block<'a> {
    #[inline]
    pub fn keys(&self) -> PackedRef<'a> {
        self.layout.keys(self.lines, self.keys)
    }

    #[inline]
    pub fn values(&self) -> PackedRef<'a> {
        self.layout.values(self.lines, self.values)
    }
}

impl Head {
    /// Returns the number of slots: entries and holes.
    pub fn slots(&self) -> usize {
        self.keys.end
    }

    pub fn has_holes(&self) -> bool {
        self.len < self.slots()
    }

    /// Returns whether a slot holds an entry.
    pub fn is_valid(&self, slot: usize) -> bool {
        slot >= self.packed_keys
            || self.validity.is_empty()
            || self.validity[slot / 32] >> (slot % 32) & 1 == 1
    }

    /// Returns the slots of entries, given in increasing order.
    pub fn slots_of(&self, entries: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> {
        let mut word = 0;
        let mut before = 0; // entries held in the words before
        entries.map(move |entry| {
            if self.validity.is_empty() {
                return entry;
            }
            while let Some(bits) = self.validity.get(word)
                && before + bits.count_ones() as usize <= entry
            {
                before += bits.count_ones() as usize;
                word += 1;
            }
            match self.validity.get(word) {
                Some(&bits) => 32 * word + nth_one(bits, entry - before),
                None => self.packed_keys + entry - before,
            }
        })
    }

    /// Returns the slots of a range of entries: from its first entry's slot to just after its last
    /// one's.
    pub fn slot_range(&self, entries: &Range<usize>) -> Range<usize> {
        if entries.is_empty() {
            return 0..0;
        }
        if !self.has_holes() {
            return entries.clone();
        }
        let mut ends = self.slots_of([entries.start, entries.end - 1].into_iter());
        let first = ends.next().unwrap_or(0);
        first..ends.next().unwrap_or(first) + 1
    }

    /// Sets the bits of the given packed slots, and clears all others.
    pub fn set_validity(&mut self, slots: impl Iterator<Item = usize>) {
        self.validity = vec![0; self.packed_keys.div_ceil(32)];
        slots.for_each(|slot| self.validity[slot / 32] |= 1 << (slot % 32));
        self.drop_full_mask();
    }

    /// Returns a bit for each packed key, set while it is held.
    #[cfg(feature = "save")]
    pub fn validity_bits(&self) -> std::borrow::Cow<'_, [u32]> {
        if !self.validity.is_empty() {
            return (&*self.validity).into();
        }
        let mut bits = vec![u32::MAX; self.packed_keys.div_ceil(32)];
        if let Some(last) = bits.last_mut()
            && !self.packed_keys.is_multiple_of(32)
        {
            *last = (1 << (self.packed_keys % 32)) - 1;
        }
        bits.into()
    }

    /// Removes the mask if there are no holes.
    pub fn drop_full_mask(&mut self) {
        if !self.has_holes() {
            self.validity = Vec::new();
        }
    }

    /// Changes the number of packed keys. New ones are held.
    pub fn set_packed_keys(&mut self, count: usize) {
        let before = std::mem::replace(&mut self.packed_keys, count);
        if self.validity.is_empty() {
            return;
        }
        self.validity.resize(count.div_ceil(32), 0);
        (before..count).for_each(|slot| self.validity[slot / 32] |= 1 << (slot % 32));
        if count < before && !count.is_multiple_of(32) {
            self.validity[count / 32] &= (1 << (count % 32)) - 1;
        }
    }

    /// Returns the counts after an append of `tokens` tokens.
    pub fn grown(&self, format: &Format, tokens: usize) -> Growth {
        let slots = self.slots().saturating_add(tokens);
        let (keys, values) = format.ready(slots - self.packed_keys, slots - self.packed_values);
        let (packed_keys, packed_values) = (self.packed_keys + keys, self.packed_values + values);
        let start = |residual: &Residual, packed: usize| {
            residual.start.max(packed.saturating_sub(format.residual_overlap()))
        };
        Growth {
            packed_keys,
            packed_values,
            slots,
            key_start: start(&self.keys, packed_keys),
            value_start: start(&self.values, packed_values),
        }
    }

    /// Returns the blocks written by an append, each with the slots of the keys and values packed
    /// into it.
    pub fn written_blocks(
        &self,
        chunk: usize,
        to: &Growth,
    ) -> impl Iterator<Item = (usize, [Range<usize>; 2])> {
        let parts = [self.packed_keys..to.packed_keys, self.packed_values..to.packed_values];
        let first = self.packed_keys.min(self.packed_values) / chunk;
        let last = to.packed_keys.max(to.packed_values).div_ceil(chunk);
        (first..last).filter_map(move |i| {
            let within = |part: &Range<usize>| {
                let start = part.start.max(i * chunk);
                start..part.end.min((i + 1) * chunk).max(start)
            };
            let parts = [within(&parts[0]), within(&parts[1])];
            (!parts.iter().all(Range::is_empty)).then_some((i, parts))
        })
    }

    /// Returns the memory that growth takes: new blocks, and copies of shared ones. The running
    /// time does not depend on the number of new blocks.
    pub fn delta_to_grow(&self, memory: &PoolMemory, chunk: usize, to: &Growth) -> BlockDelta {
        let held = self.blocks.len();
        let written = self.written_blocks(chunk, to).take_while(|(i, _)| *i < held);
        let copies = written.filter(|(i, _)| memory.blocks.is_shared(self.blocks[*i])).count();
        let new = to.packed_keys.max(to.packed_values).div_ceil(chunk).saturating_sub(held);
        BlockDelta {
            blocks: (copies + new) as isize,
            key_pages: self.keys.pages_needed(&memory.key_pages, to.key_start, to.slots),
            value_pages: self.values.pages_needed(&memory.value_pages, to.value_start, to.slots),
        }
    }

    /// Returns the peak memory of growth by `tokens` tokens, divided into any number of calls. Each
    /// kind of memory has its own peak.
    ///
    /// The number of blocks never decreases. The number of pages peaks just before the last group
    /// is packed or, depending on how the tokens in full precision are aligned to pages, during the
    /// last tokens.
    pub fn peak_to_grow(&self, memory: &PoolMemory, format: &Format, tokens: usize) -> BlockDelta {
        let chunk = format.block_tokens();
        let all = self.delta_to_grow(memory, chunk, &self.grown(format, tokens));
        let mut peak = BlockDelta { blocks: all.blocks.max(0), ..BlockDelta::default() };
        let packed = self.grown(format, tokens).packed_keys;
        // Finds the smallest number of tokens after which as many keys are packed as after all
        // tokens.
        let (mut low, mut high) = (0, tokens);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.grown(format, middle).packed_keys < packed {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        let last = tokens.saturating_add(1).saturating_sub(PAGE)..=tokens;
        for tokens in last.chain(low.checked_sub(1)) {
            let to = self.grown(format, tokens);
            let keys = self.keys.pages_needed(&memory.key_pages, to.key_start, to.slots);
            let values = self.values.pages_needed(&memory.value_pages, to.value_start, to.slots);
            peak.key_pages = peak.key_pages.max(keys);
            peak.value_pages = peak.value_pages.max(values);
        }
        peak
    }

    /// Returns the `i`-th block.
    #[inline]
    pub fn block<'a>(&self, memory: &'a PoolMemory, i: usize) -> Block<'a> {
        let chunk = memory.layout.keys.capacity;
        let rows = |packed: usize| packed.saturating_sub(i * chunk).min(chunk);
        Block {
            layout: &memory.layout,
            lines: memory.blocks.get(self.blocks[i]),
            keys: rows(self.packed_keys),
            values: rows(self.packed_values),
        }
    }

    /// Writes a slot's key in f32, in the format's basis.
    pub fn read_key(&self, memory: &PoolMemory, slot: usize, codes: &mut Vec<u8>, out: &mut [f32]) {
        if slot >= self.packed_keys {
            return crate::kernel::widen_into(
                self.keys.row(&memory.key_pages, slot, out.len()),
                out,
            );
        }
        let chunk = memory.layout.keys.capacity;
        self.block(memory, slot / chunk).keys().dequantize_row(slot % chunk, codes, out);
    }

    /// Writes a slot's value in f32.
    pub fn read_value(
        &self,
        memory: &PoolMemory,
        slot: usize,
        codes: &mut Vec<u8>,
        out: &mut [f32],
    ) {
        if slot >= self.packed_values {
            return crate::kernel::widen_into(
                self.values.row(&memory.value_pages, slot, out.len()),
                out,
            );
        }
        let chunk = memory.layout.keys.capacity;
        self.block(memory, slot / chunk).values().dequantize_row(slot % chunk, codes, out);
    }

    /// Returns a copy of the tables that shares all blocks and pages.
    pub fn fork(&self, memory: &mut PoolMemory) -> Self {
        self.blocks.iter().for_each(|&block| memory.blocks.share(block));
        self.keys.share(&mut memory.key_pages);
        self.values.share(&mut memory.value_pages);
        self.clone()
    }

    /// Releases all blocks and pages.
    pub fn release(&mut self, memory: &mut PoolMemory) {
        self.blocks.drain(..).for_each(|block| memory.blocks.release(block));
        self.keys.release(&mut memory.key_pages);
        self.values.release(&mut memory.value_pages);
    }

    /// Releases the blocks from the `count`-th on.
    pub fn truncate_blocks(&mut self, memory: &mut PoolMemory, count: usize) {
        let rest = count.min(self.blocks.len())..;
        self.blocks.drain(rest).for_each(|block| memory.blocks.release(block));
    }
}

/// Returns the position of the `n`-th set bit, counted from 0.
fn nth_one(mut bits: u32, n: usize) -> usize {
    for _ in 0..n {
        bits &= bits - 1;
    }
    bits.trailing_zeros() as usize
}

//! Reference-counted blocks of one size in slabs of memory.
//!
//! A block has an identifier, which tables store, and a location, which may change: blocks are
//! compacted when many are free, and moved to larger slabs when there are many.

use super::slab_memory::{AlignedLine, MMAP_THRESHOLD, SlabMemory};
use crate::layout::Line;
use bytemuck::Zeroable;

/// Blocks per small slab.
const PER_SLAB: usize = 16;
/// If the small slabs hold this many bytes, large slabs replace them: the free blocks of one large
/// slab are then a small share of all.
const LARGE_SLABS_THRESHOLD: usize = 4 * MMAP_THRESHOLD;

#[derive(Debug, Clone)]
pub struct Slabs {
    /// Lines per block.
    lines: usize,
    /// Blocks per slab, a power of two.
    per_slab: usize,
    /// Whether unused slabs are kept.
    retain_free: bool,
    slabs: Vec<SlabMemory>,
    /// Location of each block: `slab * per_slab + number in the slab`.
    locations: Vec<u32>,
    /// Number of tables that hold each block; 0 if its identifier is free.
    references: Vec<u32>,
    free_blocks: Vec<u32>,
    free_locations: Vec<u32>,
}

impl Slabs {
    /// Creates an empty set of blocks of `lines` lines each.
    pub fn new(lines: usize) -> Self {
        Self {
            lines,
            per_slab: PER_SLAB,
            retain_free: false,
            slabs: Vec::new(),
            locations: Vec::new(),
            references: Vec::new(),
            free_blocks: Vec::new(),
            free_locations: Vec::new(),
        }
    }

    /// Changes the set to large slabs, which are kept once they are allocated.
    pub fn with_large_slabs(self) -> Self {
        Self { per_slab: self.large(), retain_free: true, ..self }
    }

    /// Removes all blocks and frees all memory.
    pub fn clear(&mut self) {
        let per_slab = if self.retain_free { self.per_slab } else { PER_SLAB };
        *self = Self { per_slab, retain_free: self.retain_free, ..Self::new(self.lines) };
    }

    /// Returns the number of blocks of a large slab.
    fn large(&self) -> usize {
        MMAP_THRESHOLD.div_ceil(self.block_bytes()).next_power_of_two().max(PER_SLAB)
    }

    /// Returns the bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.lines * size_of::<AlignedLine>()
    }

    /// Returns the number of blocks held by tables.
    pub fn used(&self) -> usize {
        self.references.len() - self.free_blocks.len()
    }

    /// Returns the exclusive upper bound of all identifiers.
    pub fn identifiers(&self) -> usize {
        self.references.len()
    }

    /// Returns the bytes of free blocks, and those of the tables of identifiers and locations.
    pub fn overhead(&self) -> (usize, usize) {
        let free = self.slabs.len() * self.per_slab - self.used();
        let tables = [&self.locations, &self.references, &self.free_blocks, &self.free_locations];
        let tables: usize = tables.map(Vec::capacity).iter().sum();
        let slabs = self.slabs.capacity() * size_of::<SlabMemory>();
        (free * self.block_bytes(), tables * size_of::<u32>() + slabs)
    }

    /// Allocates a zeroed block with one reference.
    pub fn alloc(&mut self) -> u32 {
        let location = self.alloc_location();
        match self.free_blocks.pop() {
            Some(block) => {
                (self.locations[block as usize], self.references[block as usize]) = (location, 1);
                block
            }
            None => {
                self.locations.push(location);
                self.references.push(1);
                (self.locations.len() - 1) as u32
            }
        }
    }

    /// Returns a zeroed location.
    fn alloc_location(&mut self) -> u32 {
        if let Some(location) = self.free_locations.pop() {
            let (slab, range) = self.range(location);
            self.slabs[slab][range].fill(AlignedLine::zeroed());
            return location;
        }
        let small = !self.retain_free && self.per_slab == PER_SLAB;
        if small && self.slabs.len() * PER_SLAB * self.block_bytes() >= LARGE_SLABS_THRESHOLD {
            self.compact(self.large());
            if let Some(location) = self.free_locations.pop() {
                return location;
            }
        }
        let first = (self.slabs.len() * self.per_slab) as u32;
        self.slabs.push(SlabMemory::zeroed(self.per_slab * self.lines));
        self.free_locations.extend((first + 1..first + self.per_slab as u32).rev());
        first
    }

    /// Adds a reference to a block.
    pub fn share(&mut self, block: u32) {
        self.references[block as usize] += 1;
    }

    /// Removes a reference from a block; without references it is freed.
    pub fn release(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references -= 1;
        if *references == 0 {
            self.free_blocks.push(block);
            self.free_locations.push(self.locations[block as usize]);
        }
    }

    /// Returns whether several tables hold the block.
    pub fn is_shared(&self, block: u32) -> bool {
        self.references[block as usize] > 1
    }

    /// Makes a block writable: returns the block itself if it has one reference, otherwise a copy
    /// that replaces it.
    pub fn make_unique(&mut self, block: u32) -> u32 {
        if !self.is_shared(block) {
            return block;
        }
        let copy = self.alloc();
        let lines = self.get(block).to_vec();
        self.get_mut(copy).copy_from_slice(&lines);
        self.release(block);
        copy
    }

    /// Returns a block's lines.
    pub fn get(&self, block: u32) -> &[Line] {
        let (slab, range) = self.range(self.locations[block as usize]);
        bytemuck::cast_slice(&self.slabs[slab][range])
    }

    /// Returns a block's lines for writing.
    pub fn get_mut(&mut self, block: u32) -> &mut [Line] {
        let (slab, range) = self.range(self.locations[block as usize]);
        bytemuck::cast_slice_mut(&mut self.slabs[slab][range])
    }

    /// Returns the lines of several distinct blocks for writing, in the order of their locations,
    /// each with its index in `blocks`.
    pub fn many_mut(&mut self, blocks: impl Iterator<Item = u32>) -> Vec<(usize, &mut [Line])> {
        let locations = blocks.map(|block| self.locations[block as usize] as usize);
        let mut requested: Vec<_> = locations.zip(0..).collect();
        requested.sort_unstable();
        let mut found = Vec::with_capacity(requested.len());
        let mut requested = requested.into_iter().peekable();
        let (mut rest, mut first) = (&mut self.slabs[..], 0);
        while let Some(&(location, _)) = requested.peek() {
            let slab = location / self.per_slab;
            let (slabs, later) = std::mem::take(&mut rest).split_at_mut(slab - first + 1);
            (rest, first) = (later, slab + 1);
            let Some(cells) = slabs.last_mut() else { break };
            let (mut blocks, mut next) = (cells.chunks_exact_mut(self.lines), slab * self.per_slab);
            while let Some((location, number)) = requested.next_if(|w| w.0 / self.per_slab == slab)
            {
                let Some(cells) = blocks.nth(location - next) else { break };
                found.push((number, bytemuck::cast_slice_mut(cells)));
                next = location + 1;
            }
        }
        found
    }

    /// Frees slabs if the free memory exceeds an eighth of the used memory plus one slab. The cost
    /// of moving blocks is amortized over the freed ones.
    pub fn shrink(&mut self) {
        let used = self.used();
        if self.retain_free {
            return;
        }
        if used == 0 {
            self.clear();
        } else if self.free_locations.len() > used / 8 + self.per_slab {
            let many = used * self.block_bytes() >= LARGE_SLABS_THRESHOLD / 2;
            self.compact(if many { self.large() } else { PER_SLAB });
        }
    }

    /// Moves all blocks into new slabs of `per_slab` blocks, in the order of their identifiers.
    fn compact(&mut self, per_slab: usize) {
        let slabs = self.used().div_ceil(per_slab);
        let mut moved = Self { per_slab, ..Self::new(self.lines) };
        moved.slabs.extend((0..slabs).map(|_| SlabMemory::zeroed(per_slab * self.lines)));
        let mut locations = 0..(slabs * per_slab) as u32;
        for block in (0..self.references.len()).filter(|&block| self.references[block] > 0) {
            let Some(location) = locations.next() else { break };
            let (slab, range) = moved.range(location);
            let (old_slab, old_range) = self.range(self.locations[block]);
            moved.slabs[slab][range].copy_from_slice(&self.slabs[old_slab][old_range]);
            self.locations[block] = location;
        }
        (self.per_slab, self.slabs) = (per_slab, moved.slabs);
        self.free_locations = locations.rev().collect();
    }

    fn range(&self, location: u32) -> (usize, std::ops::Range<usize>) {
        // A division would slow down a block's product.
        let shift = self.per_slab.trailing_zeros();
        let (slab, i) = (location as usize >> shift, location as usize & (self.per_slab - 1));
        (slab, i * self.lines..(i + 1) * self.lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(slabs: &mut Slabs, with: u32) -> u32 {
        let block = slabs.alloc();
        assert!(slabs.get(block).iter().all(|line| *line == [0; 16]));
        slabs.get_mut(block).fill([with; 16]);
        block
    }

    #[test]
    fn blocks_keep_their_contents_while_slabs_go() {
        let mut slabs = Slabs::new(3);
        let blocks: Vec<u32> = (0..1000).map(|i| filled(&mut slabs, i)).collect();
        for block in blocks.iter().filter(|block| *block % 7 != 3) {
            slabs.release(*block);
        }
        slabs.shrink();
        assert_eq!(slabs.used(), 143);
        assert!(slabs.overhead().0 < PER_SLAB * slabs.block_bytes());
        for &block in blocks.iter().filter(|block| *block % 7 == 3) {
            assert!(slabs.get(block).iter().all(|line| *line == [block; 16]));
        }
        // Freed locations are reused and zeroed.
        (0..500).for_each(|i| _ = filled(&mut slabs, i));
        assert_eq!(slabs.used(), 643);
    }

    #[test]
    fn shared_blocks_are_copied_before_they_are_written_to() {
        let mut slabs = Slabs::new(1);
        let block = filled(&mut slabs, 7);
        assert_eq!(slabs.make_unique(block), block);
        slabs.share(block);
        let copy = slabs.make_unique(block);
        assert_ne!(copy, block);
        slabs.get_mut(copy).fill([8; 16]);
        assert_eq!((slabs.get(block)[0][0], slabs.get(copy)[0][0]), (7, 8));
        slabs.release(block);
        slabs.release(copy);
        assert_eq!(slabs.used(), 0);
        slabs.shrink();
        assert_eq!(slabs.overhead(), (0, 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri maps nothing")]
    fn large_slabs_are_kept() {
        let mut slabs = Slabs::new(1000).with_large_slabs();
        let blocks: Vec<u32> = (0..200).map(|i| filled(&mut slabs, i)).collect();
        let found = slabs.many_mut(blocks.iter().copied());
        assert!(found.into_iter().all(|(number, lines)| lines[999][15] == number as u32));
        blocks.iter().for_each(|&block| slabs.release(block));
        slabs.shrink();
        assert_eq!(slabs.overhead().0, 256 * slabs.block_bytes());
        filled(&mut slabs, 1);
        slabs.clear();
        assert_eq!(slabs.overhead(), (0, 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "too long for an interpreter")]
    fn many_blocks_lie_in_large_slabs() {
        let mut slabs = Slabs::new(100);
        let count = 2 * LARGE_SLABS_THRESHOLD / slabs.block_bytes();
        let blocks: Vec<u32> = (0..count as u32).map(|i| filled(&mut slabs, i)).collect();
        assert!(slabs.per_slab > PER_SLAB);
        assert!(blocks.iter().all(|&block| slabs.get(block)[99][15] == block));
        let (few, rest) = blocks.split_at(100);
        rest.iter().for_each(|&block| slabs.release(block));
        slabs.shrink();
        assert_eq!(slabs.per_slab, PER_SLAB);
        assert!(few.iter().all(|&block| slabs.get(block)[99][15] == block));
        assert!(slabs.overhead().0 < PER_SLAB * slabs.block_bytes());
    }

    #[test]
    fn many_blocks_are_written_to_at_once() {
        let mut slabs = Slabs::new(2);
        let blocks: Vec<u32> = (0..100).map(|_| slabs.alloc()).collect();
        let requested: Vec<u32> = blocks.iter().rev().step_by(3).copied().collect();
        let found = slabs.many_mut(requested.iter().copied());
        assert_eq!(found.len(), requested.len());
        for (number, lines) in found {
            lines.fill([requested[number]; 16]);
        }
        assert!(requested.iter().all(|&block| slabs.get(block)[1][0] == block));
    }
}

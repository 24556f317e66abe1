//! Blocks of one size in slabs of memory, with reference counts.
//!
//! A block has an identifier, which tables hold, and a place, which may change: when much is free,
//! blocks move together and whole slabs are given back.

use crate::layout::Line;
use bytemuck::{Pod, Zeroable};

/// Blocks of a slab.
const PER_SLAB: usize = 16;

/// A line that begins a cache line, so that no vector load crosses one.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Cell(Line);

#[derive(Debug, Clone)]
pub struct Slabs {
    /// Lines of a block.
    lines: usize,
    slabs: Vec<Box<[Cell]>>,
    /// Where each block lies: `slab * PER_SLAB + number in the slab`.
    places: Vec<u32>,
    /// How many tables hold each block; 0 if its identifier is free.
    references: Vec<u32>,
    free_blocks: Vec<u32>,
    free_places: Vec<u32>,
}

impl Slabs {
    /// No blocks yet, of so many lines each.
    pub fn new(lines: usize) -> Self {
        Self {
            lines,
            slabs: Vec::new(),
            places: Vec::new(),
            references: Vec::new(),
            free_blocks: Vec::new(),
            free_places: Vec::new(),
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.lines * size_of::<Cell>()
    }

    /// Blocks that a table holds.
    pub fn used(&self) -> usize {
        self.references.len() - self.free_blocks.len()
    }

    /// All identifiers are below this.
    pub fn identifiers(&self) -> usize {
        self.references.len()
    }

    /// Bytes of blocks that no table holds, and of the tables of identifiers and places.
    pub fn overhead(&self) -> (usize, usize) {
        let free = self.slabs.len() * PER_SLAB - self.used();
        let tables = [&self.places, &self.references, &self.free_blocks, &self.free_places];
        let tables: usize = tables.map(Vec::capacity).iter().sum();
        let slabs = self.slabs.capacity() * size_of::<Box<[Cell]>>();
        (free * self.block_bytes(), tables * size_of::<u32>() + slabs)
    }

    /// A new block of zeros, held once.
    pub fn alloc(&mut self) -> u32 {
        let place = match self.free_places.pop() {
            Some(place) => {
                let (slab, range) = self.range(place);
                self.slabs[slab][range].fill(Cell::zeroed());
                place
            }
            None => {
                let first = (self.slabs.len() * PER_SLAB) as u32;
                let cells = bytemuck::allocation::zeroed_slice_box(PER_SLAB * self.lines);
                self.slabs.push(cells);
                self.free_places.extend((first + 1..first + PER_SLAB as u32).rev());
                first
            }
        };
        match self.free_blocks.pop() {
            Some(block) => {
                (self.places[block as usize], self.references[block as usize]) = (place, 1);
                block
            }
            None => {
                self.places.push(place);
                self.references.push(1);
                (self.places.len() - 1) as u32
            }
        }
    }

    /// Holds a block once more.
    pub fn share(&mut self, block: u32) {
        self.references[block as usize] += 1;
    }

    /// Holds a block once less; the last one to let go frees it.
    pub fn release(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references -= 1;
        if *references == 0 {
            self.free_blocks.push(block);
            self.free_places.push(self.places[block as usize]);
        }
    }

    /// Whether several tables hold it.
    pub fn is_shared(&self, block: u32) -> bool {
        self.references[block as usize] > 1
    }

    /// The block itself if only one table holds it, or a copy in its place: what may be written to.
    pub fn unshare(&mut self, block: u32) -> u32 {
        if !self.is_shared(block) {
            return block;
        }
        let copy = self.alloc();
        let lines = self.get(block).to_vec();
        self.get_mut(copy).copy_from_slice(&lines);
        self.release(block);
        copy
    }

    /// A block's lines.
    pub fn get(&self, block: u32) -> &[Line] {
        let (slab, range) = self.range(self.places[block as usize]);
        bytemuck::cast_slice(&self.slabs[slab][range])
    }

    /// A block's lines, to write to.
    pub fn get_mut(&mut self, block: u32) -> &mut [Line] {
        let (slab, range) = self.range(self.places[block as usize]);
        bytemuck::cast_slice_mut(&mut self.slabs[slab][range])
    }

    /// The lines of several blocks, to write to; no block may be named twice. They come in the order
    /// of their places, each with its number among those asked for.
    pub fn many_mut(&mut self, blocks: impl Iterator<Item = u32>) -> Vec<(usize, &mut [Line])> {
        let places = blocks.map(|block| self.places[block as usize] as usize);
        let mut wanted: Vec<_> = places.zip(0..).collect();
        wanted.sort_unstable();
        let mut found = Vec::with_capacity(wanted.len());
        let mut wanted = wanted.into_iter().peekable();
        let (mut rest, mut first) = (&mut self.slabs[..], 0);
        while let Some(&(place, _)) = wanted.peek() {
            let slab = place / PER_SLAB;
            let (slabs, later) = std::mem::take(&mut rest).split_at_mut(slab - first + 1);
            (rest, first) = (later, slab + 1);
            let Some(cells) = slabs.last_mut() else { break };
            for (i, cells) in cells.chunks_exact_mut(self.lines).enumerate() {
                if let Some((_, number)) = wanted.next_if(|w| w.0 == slab * PER_SLAB + i) {
                    found.push((number, bytemuck::cast_slice_mut(cells)));
                }
            }
        }
        found
    }

    /// Gives slabs back if more is free than an eighth of what is used, and a slab: each block that
    /// moves for it is paid for by blocks freed.
    pub fn shrink(&mut self) {
        let used = self.used();
        if used == 0 {
            *self = Self::new(self.lines);
        } else if self.free_places.len() > used / 8 + PER_SLAB {
            self.move_together(used.div_ceil(PER_SLAB));
        }
    }

    /// Leaves so many slabs, the fullest ones.
    fn move_together(&mut self, keep: usize) {
        let mut blocks_of = vec![Vec::new(); self.slabs.len()];
        for (block, &place) in self.places.iter().enumerate() {
            if self.references[block] > 0 {
                blocks_of[place as usize / PER_SLAB].push(block);
            }
        }
        let mut slabs: Vec<_> =
            std::mem::take(&mut self.slabs).into_iter().zip(blocks_of).collect();
        slabs.sort_by_key(|(_, blocks)| std::cmp::Reverse(blocks.len()));
        let given_back = slabs.split_off(keep);
        self.free_places.clear();
        for (slab, (cells, blocks)) in slabs.into_iter().enumerate() {
            let mut taken = [false; PER_SLAB];
            for block in blocks {
                let i = self.places[block] as usize % PER_SLAB;
                taken[i] = true;
                self.places[block] = (slab * PER_SLAB + i) as u32;
            }
            let free = (0..PER_SLAB).rev().filter(|&i| !taken[i]);
            self.free_places.extend(free.map(|i| (slab * PER_SLAB + i) as u32));
            self.slabs.push(cells);
        }
        for (cells, blocks) in given_back {
            for block in blocks {
                let i = self.places[block] as usize % PER_SLAB;
                let Some(place) = self.free_places.pop() else { return };
                let (slab, range) = self.range(place);
                let from = &cells[i * self.lines..][..self.lines];
                self.slabs[slab][range].copy_from_slice(from);
                self.places[block] = place;
            }
        }
        for table in [&mut self.free_places, &mut self.free_blocks] {
            table.shrink_to_fit();
        }
    }

    fn range(&self, place: u32) -> (usize, std::ops::Range<usize>) {
        let (slab, i) = (place as usize / PER_SLAB, place as usize % PER_SLAB);
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
        // Freed places are taken again, and are empty.
        (0..500).for_each(|i| _ = filled(&mut slabs, i));
        assert_eq!(slabs.used(), 643);
    }

    #[test]
    fn shared_blocks_are_copied_before_they_are_written_to() {
        let mut slabs = Slabs::new(1);
        let block = filled(&mut slabs, 7);
        assert_eq!(slabs.unshare(block), block);
        slabs.share(block);
        let copy = slabs.unshare(block);
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
    fn many_blocks_are_written_to_at_once() {
        let mut slabs = Slabs::new(2);
        let blocks: Vec<u32> = (0..100).map(|_| slabs.alloc()).collect();
        let wanted: Vec<u32> = blocks.iter().rev().step_by(3).copied().collect();
        let found = slabs.many_mut(wanted.iter().copied());
        assert_eq!(found.len(), wanted.len());
        for (number, lines) in found {
            lines.fill([wanted[number]; 16]);
        }
        assert!(wanted.iter().all(|&block| slabs.get(block)[1][0] == block));
    }
}

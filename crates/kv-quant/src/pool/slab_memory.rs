//! Memory of slabs. Small slabs come from the heap; large slabs are memory-mapped and use huge
//! pages where the system has them. A sequence of 32,768 tokens spans ten thousand 4 KiB pages,
//! more than the TLB holds, so decoding would wait for page table walks.

use std::ops::{Deref, DerefMut};

use crate::layout::Line;
use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// Slabs of at least this many bytes are memory-mapped: two huge pages.
pub const MMAP_THRESHOLD: usize = 4 << 20;

/// A line aligned to a cache line, so that no vector load crosses a boundary.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct AlignedLine(Line);

#[derive(Debug)]
pub enum SlabMemory {
    Heap(Box<[AlignedLine]>),
    Mapped(MmapMut),
}

impl SlabMemory {
    pub fn zeroed(count: usize) -> Self {
        let bytes = count * size_of::<AlignedLine>();
        // Miri does not support memory maps.
        let map = (bytes >= MMAP_THRESHOLD && !cfg!(miri)).then(|| MmapMut::map_anon(bytes));
        let Some(Ok(map)) = map else {
            return Self::Heap(bytemuck::allocation::zeroed_slice_box(count));
        };
        // Without huge pages the memory works as well.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self::Mapped(map)
    }
}

impl Clone for SlabMemory {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl Deref for SlabMemory {
    type Target = [AlignedLine];

    #[inline]
    fn deref(&self) -> &[AlignedLine] {
        match self {
            Self::Heap(cells) => cells,
            Self::Mapped(map) => bytemuck::cast_slice(map),
        }
    }
}

impl DerefMut for SlabMemory {
    fn deref_mut(&mut self) -> &mut [AlignedLine] {
        match self {
            Self::Heap(cells) => cells,
            Self::Mapped(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri maps nothing")]
    fn large_memory_is_zeroed_and_copied() {
        let mut cells = SlabMemory::zeroed(MMAP_THRESHOLD / size_of::<AlignedLine>());
        assert!(matches!(cells, SlabMemory::Mapped(_)));
        assert!(cells.iter().all(|cell| cell.0 == [0; 16]));
        cells[7] = AlignedLine([3; 16]);
        assert_eq!(cells.clone()[7].0, [3; 16]);
        assert!(matches!(SlabMemory::zeroed(16), SlabMemory::Heap(_)));
    }
}

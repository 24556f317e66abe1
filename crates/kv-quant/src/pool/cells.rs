//! Memory of slabs. Small slabs come from the heap; large slabs are memory-mapped and use huge
//! pages where the system has them. A sequence of 32,768 tokens spans ten thousand 4 KiB pages,
//! more than the TLB holds, so decoding would wait for page table walks.

use std::ops::{Deref, DerefMut};

use crate::layout::Line;
use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// Slabs of at least this many bytes are memory-mapped: two huge pages.
pub const LARGE: usize = 4 << 20;

/// A line aligned to a cache line, so that no vector load crosses a boundary.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Cell(Line);

#[derive(Debug)]
pub enum Cells {
    Heap(Box<[Cell]>),
    Mapped(MmapMut),
}

impl Cells {
    pub fn zeroed(count: usize) -> Self {
        let bytes = count * size_of::<Cell>();
        // Miri does not support memory maps.
        let map = (bytes >= LARGE && !cfg!(miri)).then(|| MmapMut::map_anon(bytes));
        let Some(Ok(map)) = map else {
            return Self::Heap(bytemuck::allocation::zeroed_slice_box(count));
        };
        // Without huge pages the memory works as well.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self::Mapped(map)
    }
}

impl Clone for Cells {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl Deref for Cells {
    type Target = [Cell];

    #[inline]
    fn deref(&self) -> &[Cell] {
        match self {
            Self::Heap(cells) => cells,
            Self::Mapped(map) => bytemuck::cast_slice(map),
        }
    }
}

impl DerefMut for Cells {
    fn deref_mut(&mut self) -> &mut [Cell] {
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
        let mut cells = Cells::zeroed(LARGE / size_of::<Cell>());
        assert!(matches!(cells, Cells::Mapped(_)));
        assert!(cells.iter().all(|cell| cell.0 == [0; 16]));
        cells[7] = Cell([3; 16]);
        assert_eq!(cells.clone()[7].0, [3; 16]);
        assert!(matches!(Cells::zeroed(16), Cells::Heap(_)));
    }
}

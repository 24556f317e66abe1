//! Memory of a pool's blocks. Small slabs come from the heap; large slabs are memory-mapped and use
//! huge pages where the system has them. A sequence of 32,768 tokens spans tens of thousands of 4
//! KiB pages, more than the TLB holds, so decoding would wait for page table walks.

use std::ops::{Deref, DerefMut};

use crate::attention::Element;
use memmap2::MmapMut;

/// Slabs of at least this many bytes are memory-mapped: two huge pages.
const MMAP_THRESHOLD: usize = 4 << 20;

#[derive(Debug)]
pub enum Slab<T> {
    Heap(Box<[T]>),
    Mapped(MmapMut),
}

impl<T: Element> Slab<T> {
    pub fn zeroed(count: usize) -> Self {
        let bytes = count * size_of::<T>();
        let Some(Ok(map)) = (bytes >= MMAP_THRESHOLD).then(|| MmapMut::map_anon(bytes)) else {
            return Self::Heap(vec![T::zero(); count].into_boxed_slice());
        };
        // Without huge pages the memory works as well, only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self::Mapped(map)
    }
}

impl<T: Element> Deref for Slab<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Heap(numbers) => numbers,
            Self::Mapped(map) => bytemuck::cast_slice(map),
        }
    }
}

impl<T: Element> DerefMut for Slab<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Heap(numbers) => numbers,
            Self::Mapped(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn large_memory_is_mapped_zeroed_and_writable() {
        let mut slab = Slab::<bf16>::zeroed(MMAP_THRESHOLD / 2);
        assert!(matches!(slab, Slab::Mapped(_)) && slab.len() == MMAP_THRESHOLD / 2);
        assert!(slab.iter().all(|&x| x == bf16::ZERO));
        slab[7] = bf16::ONE;
        assert_eq!(slab[..9].iter().map(|x| x.to_f32()).sum::<f32>(), 1.0);
        assert!(matches!(Slab::<f32>::zeroed(16), Slab::Heap(_)));
    }
}

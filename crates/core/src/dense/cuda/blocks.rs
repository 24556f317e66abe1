//! Reference-counted blocks of one size in slabs of device memory.

use std::sync::Arc;

use crate::{Error, Result};
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, result};

/// Size of the smallest slab, in bytes.
const SLAB: usize = 1 << 16;

/// The blocks of one store.
#[derive(Debug)]
pub struct Blocks {
    stream: Arc<CudaStream>,
    /// Bytes per block.
    size: usize,
    /// The largest number of bytes of all blocks.
    capacity: usize,
    slabs: Vec<CudaSlice<u8>>,
    /// Block addresses by number. All are multiples of the block size, so prefill can derive block
    /// numbers from them.
    addresses: Vec<u64>,
    /// The lowest and the highest of them; 0 without blocks.
    lowest: u64,
    highest: u64,
    references: Vec<u32>,
    /// Blocks with more than one reference.
    shared: usize,
    free: Vec<u32>,
}

impl Blocks {
    pub fn new(stream: Arc<CudaStream>, size: usize, capacity: usize) -> Self {
        let (slabs, addresses) = (Vec::new(), Vec::new());
        let (references, free) = (Vec::new(), Vec::new());
        let (lowest, highest, shared) = (0, 0, 0);
        Self { stream, size, capacity, slabs, addresses, lowest, highest, references, shared, free }
    }

    /// Checks that `needed` blocks are free or can be allocated.
    pub fn check(&self, needed: usize) -> Result<()> {
        let free = self.free.len() + self.unallocated();
        if needed <= free {
            return Ok(());
        }
        let (needed, free) = (needed.saturating_mul(self.size), free.saturating_mul(self.size));
        Err(Error::PoolFull { what: "pool of dense blocks".into(), needed, free })
    }

    fn unallocated(&self) -> usize {
        self.capacity / self.size - self.addresses.len()
    }

    /// Takes `count` unused blocks.
    pub fn take(&mut self, count: usize) -> Result<Vec<u32>> {
        self.check(count)?;
        self.reserve(count)?;
        let taken = self.free.split_off(self.free.len() - count);
        taken.iter().for_each(|&block| self.references[block as usize] = 1);
        Ok(taken)
    }

    fn reserve(&mut self, count: usize) -> Result<()> {
        if count <= self.free.len() {
            return Ok(());
        }
        // Grows by an eighth, so that growth is rare.
        let needed = (self.addresses.len() / 8).max(SLAB / self.size).min(self.unallocated());
        let blocks = needed.max(count - self.free.len());
        let bytes = (blocks + 1) * self.size;
        // SAFETY: an entry of a block is written before it is read; masked elements may hold
        // anything.
        let slab = unsafe { self.stream.alloc::<u8>(bytes) }?;
        let start = slab.device_ptr(&self.stream).0.next_multiple_of(self.size as u64);
        let first = self.addresses.len() as u32;
        let last = start + (blocks as u64 - 1) * self.size as u64;
        self.lowest = if first == 0 { start } else { self.lowest.min(start) };
        self.highest = self.highest.max(last);
        self.addresses.extend((start..=last).step_by(self.size));
        self.references.resize(self.addresses.len(), 0);
        self.free.extend((first..first + blocks as u32).rev());
        self.slabs.push(slab);
        Ok(())
    }

    pub fn share(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references += 1;
        self.shared += usize::from(*references == 2);
    }

    /// Returns whether any block has more than one reference.
    pub fn any_shared(&self) -> bool {
        self.shared > 0
    }

    pub fn shared(&self, block: u32) -> bool {
        self.references[block as usize] > 1
    }

    pub fn release(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references -= 1;
        match *references {
            0 => self.free.push(block),
            1 => self.shared -= 1,
            _ => {}
        }
    }

    /// Copies one block to another.
    pub fn copy(&self, from: u32, to: u32) -> Result<()> {
        let (from, to) = (self.address(from), self.address(to));
        // SAFETY: both are blocks of this size, and the stream runs operations in order.
        unsafe { result::memcpy_dtod_async(to, from, self.size, self.stream.cu_stream()) }?;
        Ok(())
    }

    pub fn address(&self, block: u32) -> u64 {
        self.addresses[block as usize]
    }

    /// Returns the lowest block address and the number of blocks from it to the end of the highest
    /// block.
    pub fn extent(&self) -> (u64, usize) {
        (self.lowest, (self.highest - self.lowest) as usize / self.size + 1)
    }

    /// Returns the bytes of a block.
    pub fn size(&self) -> usize {
        self.size
    }

    pub fn count(&self) -> usize {
        self.addresses.len()
    }

    /// Returns the bytes of all slabs.
    pub fn bytes(&self) -> usize {
        self.slabs.iter().map(CudaSlice::len).sum()
    }

    /// Frees all memory. No table may name a block.
    pub fn clear(&mut self) {
        *self = Self::new(self.stream.clone(), self.size, self.capacity);
    }
}

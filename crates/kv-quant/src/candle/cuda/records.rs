//! Records: reference-counted blocks of one size in slabs of device memory.

use longctx_core::Result;
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The smallest slab, in bytes.
const SLAB: usize = 1 << 16;

/// The records of one pool. Several tables can share a record only if its final content is
/// determined.
#[derive(Debug)]
pub struct Records {
    stream: Arc<CudaStream>,
    /// Bytes per record.
    size: usize,
    slabs: Vec<CudaSlice<u8>>,
    /// Addresses by record number.
    addresses: Vec<u64>,
    counts: Vec<u32>,
    free: Vec<u32>,
}

/// Records shared by several tables.
pub type Shared = Arc<Mutex<Records>>;

pub fn lock(records: &Shared) -> MutexGuard<'_, Records> {
    // Nothing panics in the middle of a change.
    records.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Records {
    pub fn new(stream: Arc<CudaStream>, size: usize) -> Shared {
        let (slabs, addresses, counts, free) = Default::default();
        Arc::new(Mutex::new(Self { stream, size, slabs, addresses, counts, free }))
    }

    /// Returns the number of records held by tables.
    pub fn used(&self) -> usize {
        self.addresses.len() - self.free.len()
    }

    /// Returns the bytes of all slabs.
    pub fn bytes(&self) -> usize {
        self.slabs.iter().map(CudaSlice::len).sum()
    }

    /// Ensures that `count` records are free. Allocates at most `room` records beyond those in use,
    /// or `count` if that is more.
    pub fn reserve(&mut self, count: usize, room: usize) -> Result<()> {
        if count <= self.free.len() {
            return Ok(());
        }
        // Grows by a quarter, so that growth is rare.
        let wanted = (self.addresses.len() / 4).max(SLAB / self.size);
        let wanted = wanted.min(room.saturating_sub(self.free.len()));
        let count = wanted.max(count - self.free.len());
        // SAFETY: a tile of a record is written before it is read.
        let slab = unsafe { self.stream.alloc::<u8>(count * self.size) }?;
        let (base, first) = (slab.device_ptr(&self.stream).0, self.addresses.len() as u32);
        self.addresses.extend((0..count).map(|i| base + (i * self.size) as u64));
        self.counts.resize(self.addresses.len(), 0);
        self.free.extend((first..self.addresses.len() as u32).rev());
        self.slabs.push(slab);
        Ok(())
    }

    fn release(&mut self, number: u32) {
        let count = &mut self.counts[number as usize];
        *count -= 1;
        if *count == 0 {
            self.free.push(number);
        }
    }

    /// Frees the slabs if no record is in use.
    pub fn shrink(&mut self) {
        if self.used() == 0 {
            self.slabs.clear();
            self.addresses.clear();
            self.counts.clear();
            self.free.clear();
        }
    }
}

/// The host's copy of a kv head's block table. A clone shares the records.
#[derive(Debug)]
pub struct Table {
    records: Shared,
    numbers: Vec<u32>,
}

impl Table {
    pub fn new(records: &Shared) -> Self {
        Self { records: records.clone(), numbers: Vec::new() }
    }

    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Returns the addresses of the records from index `first` on.
    pub fn addresses(&self, first: usize) -> Vec<u64> {
        let records = lock(&self.records);
        self.numbers[first..].iter().map(|&number| records.addresses[number as usize]).collect()
    }

    /// Returns the addresses of the records at some indices.
    pub fn addresses_of(&self, places: &[usize]) -> Vec<u64> {
        let records = lock(&self.records);
        places.iter().map(|&place| records.addresses[self.numbers[place] as usize]).collect()
    }

    /// Appends `count` records.
    pub fn take(&mut self, count: usize) -> Result<()> {
        let mut records = lock(&self.records);
        records.reserve(count, usize::MAX)?;
        let rest = records.free.len() - count;
        for number in records.free.split_off(rest) {
            records.counts[number as usize] = 1;
            self.numbers.push(number);
        }
        Ok(())
    }

    /// Frees the records for whose indices `keep` returns false.
    pub fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        let mut records = lock(&self.records);
        let mut place = 0;
        self.numbers.retain(|&number| {
            let kept = keep(place);
            place += 1;
            if !kept {
                records.release(number);
            }
            kept
        });
    }
}

impl Clone for Table {
    fn clone(&self) -> Self {
        let mut records = lock(&self.records);
        self.numbers.iter().for_each(|&number| records.counts[number as usize] += 1);
        Self { records: self.records.clone(), numbers: self.numbers.clone() }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.retain(|_| false);
    }
}

//! Copies to a device from page-locked host memory.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DriverError, HostSlice, PinnedHostSlice, SyncOnDrop,
};

/// From about this size on, the driver may wait for the stream before it copies pageable memory.
const MIN_BYTES: usize = 1 << 14;
/// Number of buffers of a device: the copies of several layers.
const BUFFERS: usize = 256;

/// The buffers of each device, by ordinal. They keep its context alive.
static DEVICES: Mutex<BTreeMap<usize, Ring>> = Mutex::new(BTreeMap::new());

/// Buffers that are used in turn.
#[derive(Default)]
struct Ring {
    buffers: Vec<PinnedHostSlice<u64>>,
    next: usize,
}

impl Ring {
    /// Returns a buffer of at least `len` words.
    fn buffer(
        &mut self,
        context: &Arc<CudaContext>,
        len: usize,
    ) -> Result<&mut PinnedHostSlice<u64>, DriverError> {
        let place = self.next % BUFFERS;
        self.next += 1;
        // SAFETY: the words are written before they are read.
        let new = || unsafe { context.alloc_pinned::<u64>(len.next_power_of_two()) };
        match self.buffers.get(place) {
            None => self.buffers.push(new()?),
            Some(held) if held.len() < len => self.buffers[place] = new()?,
            Some(_) => {}
        }
        Ok(&mut self.buffers[place])
    }
}

/// Copies words to new memory on the stream's device, without waiting for the stream's work.
pub fn copy(stream: &Arc<CudaStream>, words: &[u64]) -> Result<CudaSlice<u64>, DriverError> {
    if size_of_val(words) < MIN_BYTES {
        return stream.clone_htod(words);
    }
    let context = stream.context();
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let buffer = devices.entry(context.ordinal()).or_default().buffer(context, words.len())?;
    // Waits for the copy that used the buffer before.
    buffer.as_mut_slice()?[..words.len()].copy_from_slice(words);
    stream.clone_htod(&Part { buffer, len: words.len() })
}

/// The first words of a buffer.
struct Part<'a> {
    buffer: &'a mut PinnedHostSlice<u64>,
    len: usize,
}

// The safety of both slices is that of the buffer's: the caller uses them with `stream`.
impl HostSlice<u64> for Part<'_> {
    fn len(&self) -> usize {
        self.len
    }

    unsafe fn stream_synced_slice<'a>(
        &'a self,
        stream: &'a CudaStream,
    ) -> (&'a [u64], SyncOnDrop<'a>) {
        // SAFETY: the caller uses the slice with this stream.
        let (all, sync) = unsafe { self.buffer.stream_synced_slice(stream) };
        (&all[..self.len], sync)
    }

    unsafe fn stream_synced_mut_slice<'a>(
        &'a mut self,
        stream: &'a CudaStream,
    ) -> (&'a mut [u64], SyncOnDrop<'a>) {
        // SAFETY: as above.
        let (all, sync) = unsafe { self.buffer.stream_synced_mut_slice(stream) };
        (&mut all[..self.len], sync)
    }
}

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
static DEVICES: Mutex<BTreeMap<usize, Staging>> = Mutex::new(BTreeMap::new());

/// Page-locked buffers on the host that are used in turn for copies to a device.
#[derive(Debug)]
pub struct Staging {
    buffers: Vec<PinnedHostSlice<u8>>,
    count: usize,
    next: usize,
}

impl Staging {
    /// Creates a set of `count` buffers, which are allocated when they are needed.
    pub fn new(count: usize) -> Self {
        Self { buffers: Vec::new(), count: count.max(1), next: 0 }
    }

    /// Copies bytes to the start of `to` without waiting for the stream's work, except for the copy
    /// that last used the same buffer.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn copy(
        &mut self,
        stream: &Arc<CudaStream>,
        bytes: &[u8],
        to: &mut CudaSlice<u8>,
    ) -> Result<(), DriverError> {
        stream.memcpy_htod(&self.part(stream.context(), bytes)?, to)
    }

    /// Returns a buffer that contains the bytes.
    fn part(&mut self, context: &Arc<CudaContext>, bytes: &[u8]) -> Result<Part<'_>, DriverError> {
        let (place, len) = (self.next % self.count, bytes.len());
        self.next += 1;
        // SAFETY: the bytes are written before they are read.
        let new = || unsafe { context.alloc_pinned::<u8>(len.next_power_of_two()) };
        match self.buffers.get(place) {
            None => self.buffers.push(new()?),
            Some(held) if held.len() < len => self.buffers[place] = new()?,
            Some(_) => {}
        }
        let buffer = &mut self.buffers[place];
        // Waits for the copy that used the buffer before.
        buffer.as_mut_slice()?[..len].copy_from_slice(bytes);
        Ok(Part { buffer, len })
    }
}

/// Copies bytes to new memory on the stream's device, without waiting for the stream's work.
pub fn copy(stream: &Arc<CudaStream>, bytes: &[u8]) -> Result<CudaSlice<u8>, DriverError> {
    if bytes.len() < MIN_BYTES {
        return stream.clone_htod(bytes);
    }
    let context = stream.context();
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let staging = devices.entry(context.ordinal()).or_insert_with(|| Staging::new(BUFFERS));
    stream.clone_htod(&staging.part(context, bytes)?)
}

/// The first bytes of a buffer.
struct Part<'a> {
    buffer: &'a mut PinnedHostSlice<u8>,
    len: usize,
}

// The safety of both slices is that of the buffer's: the caller uses them with `stream`.
impl HostSlice<u8> for Part<'_> {
    fn len(&self) -> usize {
        self.len
    }

    unsafe fn stream_synced_slice<'a>(
        &'a self,
        stream: &'a CudaStream,
    ) -> (&'a [u8], SyncOnDrop<'a>) {
        // SAFETY: the caller uses the slice with this stream.
        let (all, sync) = unsafe { self.buffer.stream_synced_slice(stream) };
        (&all[..self.len], sync)
    }

    unsafe fn stream_synced_mut_slice<'a>(
        &'a mut self,
        stream: &'a CudaStream,
    ) -> (&'a mut [u8], SyncOnDrop<'a>) {
        // SAFETY: as above.
        let (all, sync) = unsafe { self.buffer.stream_synced_mut_slice(stream) };
        (&mut all[..self.len], sync)
    }
}

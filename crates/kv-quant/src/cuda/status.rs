//! Where kernels leave word of numbers that cannot be quantized: a word of the host's memory, read without waiting for the device.

use super::wrap;
use candle_core::cuda::cudarc::driver::{CudaContext, PinnedHostSlice, sys};
use longctx_core::{Error, Result};
use std::sync::Arc;

#[derive(Debug)]
pub struct Status {
    word: *mut u64,
    /// Owns the word.
    _memory: PinnedHostSlice<u64>,
}

// SAFETY: the word is read and written with volatile accesses alone, and lives as long as the struct.
unsafe impl Send for Status {}
// SAFETY: as above.
unsafe impl Sync for Status {}

impl Status {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the word is written before it is read.
        let mut memory =
            unsafe { context.alloc_pinned_with_flags::<u64>(1, flags) }.map_err(wrap)?;
        let word = memory.as_mut_ptr().map_err(wrap)?;
        // SAFETY: `word` points to the one number allocated above.
        unsafe { word.write_volatile(0) };
        Ok(Self { word, _memory: memory })
    }

    /// The word's address, the same on the device as on the host.
    pub fn address(&self) -> u64 {
        self.word as u64
    }

    /// The error that a kernel has left by now; kv heads are numbered batch by batch.
    pub fn check(&self, group: usize) -> Result<()> {
        // SAFETY: `word` is valid as long as `self`; the device writes it whole.
        let word = unsafe { self.word.read_volatile() };
        if word == 0 {
            return Ok(());
        }
        let (values, row) = (word >> 62 & 1 == 1, word >> 40 & 0x3f_ffff);
        let (token, channel) = (word >> 9 & 0x7fff_ffff, word & 0x1ff);
        let what = if values { "values" } else { "keys" };
        let expected = "finite numbers whose range f16 can hold";
        let place = format!(
            "batch and kv head {row}, {what} of the group of {group} from token {token}, channel {channel}"
        );
        Err(Error::mismatch(place, expected, "infinite, NaN or too wide"))
    }
}

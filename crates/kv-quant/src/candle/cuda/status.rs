//! Reports of numbers that cannot be quantized. Kernels write them to words in host memory, which
//! are read without waiting for the device.

use crate::cuda::Report;
use longctx_core::{Error, Result, SeqId};
use longctx_cuda::cudarc::driver::{CudaContext, PinnedHostSlice, sys};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number of words. Sequences share a word if their numbers differ by a multiple of it.
const WORDS: u64 = 1024;
/// Number of bits of a sequence's number, and of a kv head's, in a report.
const NUMBER: u32 = 20;
const HEAD: u32 = 9;

#[derive(Debug)]
pub struct Status {
    /// Number of sequences created so far.
    begun: AtomicU64,
    words: *mut u64,
    /// The memory of the words.
    _memory: PinnedHostSlice<u64>,
    context: Arc<CudaContext>,
}

impl Drop for Status {
    fn drop(&mut self) {
        // Running kernels may write to the words. A failed device runs none.
        _ = self.context.synchronize();
    }
}

// SAFETY: the words are accessed only by volatile reads and writes, and live as long as the struct.
unsafe impl Send for Status {}
// SAFETY: as above.
unsafe impl Sync for Status {}

impl Status {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the words are written before they are read.
        let memory = unsafe { context.alloc_pinned_with_flags::<u64>(WORDS as usize, flags) };
        let mut memory = memory?;
        let words = memory.as_mut_ptr()?;
        for i in 0..WORDS as usize {
            // SAFETY: `words` points to the numbers allocated above.
            unsafe { words.add(i).write_volatile(0) };
        }
        Ok(Self { begun: AtomicU64::new(0), words, _memory: memory, context: context.clone() })
    }

    fn word(&self, number: u64) -> *mut u64 {
        // SAFETY: the index is below the number of words.
        unsafe { self.words.add(Self::index(number)) }
    }

    /// Returns the index of a sequence's word.
    pub fn index(number: u64) -> usize {
        (number % WORDS) as usize
    }

    /// Returns a number for a new sequence.
    pub fn begin(&self) -> u64 {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        if self.report(number).is_some() {
            // Clears a report of an earlier sequence with the same word. SAFETY: the word is valid
            // as long as `self`.
            unsafe { self.word(number).write_volatile(0) };
        }
        number
    }

    /// Returns the address of the words, which is the same on the device and on the host.
    pub fn address(&self) -> u64 {
        self.words as u64
    }

    /// Returns the bits of a report for a sequence and a kv head.
    pub fn tag(number: u64, head: usize) -> u64 {
        (number % (1 << NUMBER)) << 42 | (head as u64 % (1 << HEAD)) << 33
    }

    /// Returns a sequence's report, if a kernel has written one.
    fn report(&self, number: u64) -> Option<Report> {
        // SAFETY: the word is valid as long as `self`, and the device's writes are atomic.
        let word = unsafe { self.word(number).read_volatile() };
        Report::decode(word).filter(|report| report.tag >> 42 == number % (1 << NUMBER))
    }

    /// Returns the error that a kernel has reported for a sequence, if any.
    pub fn check(&self, number: u64, seq: SeqId) -> Result<()> {
        let Some(report) = self.report(number) else { return Ok(()) };
        let of = if report.values { "values" } else { "keys" };
        let head = report.tag >> 33 & ((1 << HEAD) - 1);
        let (entry, channel) = (report.slot, report.channel);
        let reason = format!(
            "NaN, an infinity or a range beyond f16's among the {of} of kv head {head}, in the \
             group from entry {entry}, channel {channel}"
        );
        Err(Error::Poisoned { seq, reason })
    }
}

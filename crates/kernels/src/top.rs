//! Scores of entries, and selection by them: kernels/top.cu.

use std::sync::Arc;

use crate::Result;
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("top");

/// Must equal the kernels' constant.
const THREADS: u32 = 1024;

longctx_cuda::args! {
    /// One kv head of a sequence, with the same layout as in the kernel. The score of an entry is
    /// the reduction of its column of `scores`, plus its score in `previous`.
    pub struct TopRow: 96, rows at 56 {
        /// `[rows, len]`, f32.
        pub scores: u64,
        /// Scores to add to those of the first entries, `[scored]`, f32.
        pub previous: u64,
        /// Positions of the first entries, `[placed]`, u32.
        pub positions: u64,
        /// Output: the scores of all entries, `[len]`, f32.
        pub all_scores: u64,
        /// Output: the scores of the selected entries, `[count]`, f32.
        pub kept_scores: u64,
        /// Output: the selected entries, `[count]`, u32, increasing.
        pub kept: u64,
        /// Output: their positions, `[count]`, u32.
        pub kept_positions: u64,
        /// Rows of `scores`.
        pub rows: i32,
        /// Number of entries.
        pub len: i32,
        /// Number of scores in `previous`.
        pub scored: i32,
        /// Number of positions in `positions`.
        pub placed: i32,
        /// The position of entry `placed`. Later entries have the positions after it.
        pub next: u32,
        /// Number of entries to select; at most `len`.
        pub count: i32,
        /// Entries at this many first positions are always selected.
        pub sinks: i32,
        /// Entries at this many last positions are always selected. `sinks + recent` is at most
        /// `count`.
        pub recent: i32,
        /// 1: a column is reduced to its maximum; 0: to its mean.
        pub maximum: i32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    struct TopArgs: 8 {
        rows: u64,
    }
}

/// Scores the entries of the `count` [`TopRow`]s at an address, and selects those with the highest
/// scores. Of equal scores the older entry is selected; NaN counts as -inf.
///
/// # Errors
/// An error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`TopRow`] give, until the launched work has finished.
pub unsafe fn top(stream: &Arc<CudaStream>, rows: u64, count: usize) -> Result<()> {
    let kernel = IMAGE.kernel(stream.context(), "top", THREADS, 0)?;
    // SAFETY: the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [count, 1, 1], &TopArgs { rows }) }?;
    Ok(())
}

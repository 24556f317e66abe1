//! Top-k selection of entries by score, and gathering by entry: kernels/top.cu.

use std::sync::Arc;

use crate::Result;
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("top");

/// Must equal the kernels' constant.
const THREADS: u32 = 1024;

longctx_cuda::args! {
    /// The arguments of [`top`], with the same layout as in the kernel.
    pub struct TopArgs: 32, len at 16 {
        /// Scores `[heads, len]`, f32.
        pub scores: u64,
        /// Output: entries `[heads, count]`, u32, increasing in each row.
        pub out: u64,
        /// Entries of a head.
        pub len: i32,
        /// Entries to select per head; at most `len`.
        pub count: i32,
        /// Number of first entries that are always selected.
        pub sinks: i32,
        /// Number of last entries that are always selected. `sinks + recent` is at most `count`.
        pub recent: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`gather`], with the same layout as in the kernel.
    pub struct GatherArgs: 40, len at 24 {
        /// Source `[heads, len]`, elements of 4 bytes.
        pub from: u64,
        /// Entries `[heads, count]`, u32.
        pub entries: u64,
        /// Output `[heads, count]`, elements of 4 bytes.
        pub out: u64,
        /// Elements of a source row.
        pub len: i32,
        /// Entries of a row.
        pub count: i32,
        /// Value of the element `len`; that of `len + i` is `next + i`.
        pub next: u32,
        /// Padding.
        pub unused: i32,
    }
}

/// Selects the entries with the highest scores of each head. Of equal scores the older entry is
/// selected; NaN counts as -inf.
///
/// # Errors
/// An error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`TopArgs`] give, until the launched work has finished.
pub unsafe fn top(stream: &Arc<CudaStream>, heads: usize, args: &TopArgs) -> Result<()> {
    let kernel = IMAGE.kernel(stream.context(), "top", THREADS, 0)?;
    // SAFETY: the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [heads, 1, 1], args) }?;
    Ok(())
}

/// Gathers elements of 4 bytes by entry.
///
/// # Errors
/// An error of the CUDA driver.
///
/// # Safety
/// As [`top`].
pub unsafe fn gather(stream: &Arc<CudaStream>, heads: usize, args: &GatherArgs) -> Result<()> {
    let kernel = IMAGE.kernel(stream.context(), "gather", THREADS, 0)?;
    let blocks = (args.count.max(0) as usize).div_ceil(THREADS as usize);
    // SAFETY: the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [blocks, heads, 1], args) }?;
    Ok(())
}

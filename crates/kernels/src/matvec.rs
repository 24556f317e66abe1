//! Products of a matrix with a few rows: kernels/matvec.cu.

use std::sync::Arc;

use crate::Half;
use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("matvec");

// Must equal the kernel's constant.
const THREADS: u32 = 128;
const WARPS: usize = THREADS as usize / 32;
/// From this many outputs on, a warp computes four of them instead of two.
const MANY_OUTPUTS: i32 = 8192;

/// The largest number of rows of one launch of [`matvec`].
pub const MAX_ROWS: usize = 4;

longctx_cuda::args! {
    /// The arguments of [`matvec`], with the same layout as in the kernels.
    ///
    /// Addresses are device addresses of contiguous f16 or bf16 arrays.
    pub struct MatVecArgs: 40, inner at 24 {
        /// `[out, inner]`.
        pub w: u64,
        /// `[rows, inner]`.
        pub x: u64,
        /// Output: `[rows, out]`.
        pub y: u64,
        /// Columns of `w` and `x`; a multiple of 8.
        pub inner: i32,
        /// Rows of `w`.
        pub out: i32,
        /// Rows of `x`: 1 to [`MAX_ROWS`].
        pub rows: i32,
        /// Padding.
        pub unused: i32,
    }
}

/// Launches `y = x wᵀ`, accumulated in f32.
///
/// # Errors
/// [`Error::Mismatch`] for addresses or rows that are not multiples of 16 bytes, or an unsupported
/// number of rows; an error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`MatVecArgs`] give, until the launched work has finished.
pub unsafe fn matvec(stream: &Arc<CudaStream>, half: Half, args: &MatVecArgs) -> Result<()> {
    let aligned = [args.w, args.x].iter().all(|address| address % 16 == 0) && args.inner % 8 == 0;
    let rows = args.rows.max(0) as usize;
    if !aligned || !(1..=MAX_ROWS).contains(&rows) || args.inner <= 0 {
        let expected = format!("1 to {MAX_ROWS} rows of multiples of 16 bytes");
        return Err(Error::mismatch("product", expected, format!("{args:?}")));
    }
    let kind = if half == Half::F16 { "f16" } else { "bf16" };
    let outputs = if args.out < MANY_OUTPUTS { 2 } else { 4 };
    let name = format!("matvec_{kind}_r{}_o{outputs}", rows.next_power_of_two());
    let kernel = IMAGE.kernel(stream.context(), &name, THREADS, 0)?;
    let blocks = (args.out.max(0) as usize).div_ceil(WARPS * outputs);
    // SAFETY: the arguments are those of the kernel, and the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [blocks, 1, 1], args) }?;
    Ok(())
}

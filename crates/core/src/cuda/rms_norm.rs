//! The norm between a decoder's blocks: kernels/rms_norm.cu.

use std::sync::Arc;

use super::Half;
use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("rms_norm");

/// As in the kernel.
const THREADS: u32 = 512;

longctx_cuda::args! {
    /// The arguments of [`rms_norm`], field for field those of the kernels.
    ///
    /// Addresses are device addresses, of arrays `[rows, columns]` in f16 or bf16, contiguous.
    pub struct RmsNormArgs: 48, columns at 40 {
        /// The first summand.
        pub x: u64,
        /// The second one. 0: none.
        pub y: u64,
        /// `[columns]`.
        pub weight: u64,
        /// Output: the sum. 0 where `y` is.
        pub sum: u64,
        /// Output: the norm of the sum, times `weight`.
        pub out: u64,
        /// Columns; a multiple of 8.
        pub columns: i32,
        /// What is added to the mean square.
        pub eps: f32,
    }
}

/// Launches `sum = x + y` and `out = sum / sqrt(mean(sum²) + eps) * weight` for each row.
///
/// # Errors
/// [`Error::Mismatch`] for addresses or columns that are not multiples of 16 bytes; the driver's.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`RmsNormArgs`] give, until the work that is launched here has ended.
pub unsafe fn rms_norm(
    stream: &Arc<CudaStream>,
    half: Half,
    rows: usize,
    args: &RmsNormArgs,
) -> Result<()> {
    let addresses = [args.x, args.y, args.weight, args.sum, args.out];
    if addresses.iter().any(|address| address % 16 != 0) || args.columns % 8 != 0 {
        let got = format!("{args:?}");
        return Err(Error::mismatch("rows of a norm", "multiples of 16 bytes", got));
    }
    let name = if half == Half::F16 { "rms_norm_f16" } else { "rms_norm_bf16" };
    let kernel = IMAGE.kernel(stream.context(), name, THREADS, 0)?;
    // SAFETY: the arguments are those of the kernel, and the caller vouches for the addresses.
    unsafe { kernel.launch(stream, [rows, 1, 1], args) }?;
    Ok(())
}

//! Residual addition and RMS norm: kernels/rms_norm.cu.

use std::sync::Arc;

use crate::Half;
use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("rms_norm");

/// Must equal the kernel's constant.
const THREADS: u32 = 512;

longctx_cuda::args! {
    /// The arguments of [`rms_norm`], with the same layout as in the kernels.
    ///
    /// Addresses are device addresses of contiguous f16 or bf16 arrays, `[rows, columns]` unless
    /// stated.
    pub struct RmsNormArgs: 48, columns at 40 {
        /// First summand.
        pub x: u64,
        /// Second summand. 0: none.
        pub y: u64,
        /// `[columns]`.
        pub weight: u64,
        /// Output: the sum. 0 if `y` is 0.
        pub sum: u64,
        /// Output: the RMS norm of the sum, times `weight`.
        pub out: u64,
        /// Columns; a multiple of 8.
        pub columns: i32,
        /// Added to the mean square.
        pub eps: f32,
    }
}

/// Launches `sum = x + y` and `out = sum / sqrt(mean(sum²) + eps) * weight` for each row.
///
/// # Errors
/// [`Error::Mismatch`] for addresses or rows that are not multiples of 16 bytes; an error of the
/// CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`RmsNormArgs`] give, until the launched work has finished.
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
    // SAFETY: the arguments are those of the kernel, which waits first, and the caller guarantees the
    // addresses.
    unsafe { kernel.launch_dependent(stream, [rows, 1, 1], args) }?;
    Ok(())
}

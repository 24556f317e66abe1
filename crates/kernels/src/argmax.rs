//! The index of each row's largest number: kernels/argmax.cu.

use std::sync::Arc;

use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("argmax");

/// Must equal the kernel's constant.
const THREADS: u32 = 1024;

longctx_cuda::args! {
    /// The arguments of [`argmax`], with the same layout as in the kernel.
    ///
    /// Addresses are device addresses.
    pub struct ArgmaxArgs: 24, columns at 16 {
        /// `[rows, columns]`, f32, contiguous.
        pub x: u64,
        /// Output, `[rows]`, u32: the lowest index of the row's largest number; [`u32::MAX`] for a
        /// row with NaN. As in [`f32::total_cmp`], -0 is less than 0.
        pub out: u64,
        /// Columns, at least 1 and less than [`u32::MAX`].
        pub columns: i64,
    }
}

/// Launches the search for the largest number of each row.
///
/// # Errors
/// [`Error::Mismatch`] for a number of columns outside of the range; an error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`ArgmaxArgs`] give, until the launched work has finished.
pub unsafe fn argmax(stream: &Arc<CudaStream>, rows: usize, args: &ArgmaxArgs) -> Result<()> {
    if !(1..i64::from(u32::MAX)).contains(&args.columns) {
        let expected = format!("1 to {}", u32::MAX - 1);
        return Err(Error::mismatch("columns of an argmax", expected, args.columns));
    }
    let kernel = IMAGE.kernel(stream.context(), "argmax", THREADS, 0)?;
    // SAFETY: the arguments are those of the kernel, and the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [rows, 1, 1], args) }?;
    Ok(())
}

//! The activation of gated feed-forward layers: kernels/silu_mul.cu.

use std::sync::Arc;

use crate::Half;
use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("silu_mul");

const THREADS: u32 = 256;
/// The largest number of thread blocks of a launch; each processes its share of the rows.
const MAX_BLOCKS: i64 = 1 << 16;

longctx_cuda::args! {
    /// The arguments of [`silu_mul`], with the same layout as in the kernels.
    ///
    /// Addresses are device addresses; strides count elements. All rows are aligned to 16 bytes.
    pub struct SiluMulArgs: 56, rows at 40 {
        /// `[rows, columns]`, f16 or bf16.
        pub gate: u64,
        /// Same shape as `gate`.
        pub up: u64,
        /// Output, `[rows, columns]`, contiguous.
        pub out: u64,
        /// Row stride of `gate`.
        pub gate_row: i64,
        /// Row stride of `up`.
        pub up_row: i64,
        /// Rows.
        pub rows: i64,
        /// Columns; a multiple of 8.
        pub columns: i64,
    }
}

/// Launches `out = silu(gate) * up`.
///
/// # Errors
/// [`Error::Mismatch`] for addresses, strides or columns that are not multiples of 16 bytes; an
/// error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`SiluMulArgs`] give, until the launched work has finished.
pub unsafe fn silu_mul(stream: &Arc<CudaStream>, half: Half, args: &SiluMulArgs) -> Result<()> {
    let aligned = [args.gate, args.up, args.out].iter().all(|address| address % 16 == 0);
    let eights = [args.gate_row, args.up_row, args.columns].iter().all(|n| n % 8 == 0);
    if !aligned || !eights {
        let got = format!("{args:?}");
        return Err(Error::mismatch("rows of gate and up", "multiples of 16 bytes", got));
    }
    let pieces = args.rows * args.columns / 8;
    if pieces == 0 {
        return Ok(());
    }
    let name = if half == Half::F16 { "silu_mul_f16" } else { "silu_mul_bf16" };
    let kernel = IMAGE.kernel(stream.context(), name, THREADS, 0)?;
    let blocks = (pieces as u64).div_ceil(u64::from(THREADS)).min(MAX_BLOCKS as u64);
    // SAFETY: the arguments are those of the kernel, and the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [blocks as usize, 1, 1], args) }?;
    Ok(())
}

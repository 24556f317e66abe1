//! The activation of gated feed-forward blocks: kernels/silu_mul.cu.

use std::sync::Arc;

use super::Half;
use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("silu_mul");

const THREADS: u32 = 256;
/// Blocks of a launch; each goes through its share of the rows.
const MOST_BLOCKS: i64 = 1 << 16;

longctx_cuda::args! {
    /// The arguments of [`silu_mul`], field for field those of the kernels.
    ///
    /// Addresses are device addresses; strides count elements. All rows begin at multiples of 16 bytes.
    pub struct SiluMulArgs: 56, rows at 40 {
        /// `[rows, columns]`, f16 or bf16.
        pub gate: u64,
        /// As `gate`.
        pub up: u64,
        /// Output, `[rows, columns]`, contiguous.
        pub out: u64,
        /// Stride of `gate`'s rows.
        pub gate_row: i64,
        /// Stride of `up`'s rows.
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
/// [`Error::Mismatch`] for addresses, strides or columns that are not multiples of 16 bytes; the
/// driver's.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`SiluMulArgs`] give, until the work that is launched here has ended.
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
    let blocks = (pieces as u64).div_ceil(u64::from(THREADS)).min(MOST_BLOCKS as u64);
    // SAFETY: the arguments are those of the kernel, and the caller vouches for the addresses.
    unsafe { kernel.launch(stream, [blocks as usize, 1, 1], args) }?;
    Ok(())
}

//! The activation of gated feed-forward blocks: kernels/silu_mul.cu.

use std::mem::{offset_of, size_of};
use std::sync::Arc;

use super::Half;
use super::image::{Image, driver};
use crate::{Error, Result};
use candle_core::cuda::cudarc::driver::{CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};

static IMAGE: Image = Image::new(include_bytes!(concat!(env!("OUT_DIR"), "/silu_mul.fatbin")));

const THREADS: u32 = 256;
/// Blocks of a launch; each goes through its share of the rows.
const MOST_BLOCKS: i64 = 1 << 16;

/// The arguments of [`silu_mul`], field for field those of the kernels.
///
/// Addresses are device addresses; strides count elements. All rows begin at multiples of 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SiluMulArgs {
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

// As in kernels/silu_mul.cu.
const _: () = assert!(size_of::<SiluMulArgs>() == 56 && offset_of!(SiluMulArgs, rows) == 40);

// SAFETY: plain numbers in C's layout, as the kernels read them.
unsafe impl DeviceRepr for SiluMulArgs {}

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
    let function = IMAGE.function(stream.context(), name)?;
    let blocks = (pieces as u64).div_ceil(u64::from(THREADS)).min(MOST_BLOCKS as u64);
    let config = LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the arguments are those of the kernel, and the caller vouches for the addresses.
    unsafe { stream.launch_builder(&function).arg(args).launch(config) }.map_err(driver)?;
    Ok(())
}

//! The rotary position embedding: kernels/rope.cu.

use std::sync::Arc;

use crate::Half;
use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("rope");

// Must equal the kernel's constant.
const THREADS: u32 = 256;
const MAX_ROTARY: i32 = 256;

longctx_cuda::args! {
    /// Heads to rotate. Strides count elements; all heads are aligned to 16 bytes.
    pub struct RopeTensor: 40 {
        /// `[tokens, heads, head_dim]`, f16 or bf16.
        pub x: u64,
        /// Output, shaped like `x`, contiguous.
        pub out: u64,
        /// Token stride of `x`.
        pub token: i64,
        /// Head stride of `x`.
        pub head: i64,
        /// Heads per token. 0: there is no tensor.
        pub heads: i64,
    }
}

impl longctx_cuda::Number for RopeTensor {}

longctx_cuda::args! {
    /// The arguments of [`rope`], with the same layout as in the kernels.
    ///
    /// Addresses are device addresses.
    pub struct RopeArgs: 112, positions at 80, tokens at 96 {
        /// Up to two tensors: queries and keys.
        pub tensors: [RopeTensor; 2],
        /// `[tokens]`, i64.
        pub positions: u64,
        /// `[rotary / 2]`, f64: radians per position.
        pub frequencies: u64,
        /// Tokens.
        pub tokens: i32,
        /// Channels per head; a multiple of 8.
        pub head_dim: i32,
        /// Number of leading channels of a head that rotate; a multiple of 16, at most 256.
        pub rotary: i32,
        /// Padding.
        pub unused: i32,
    }
}

/// Launches the rotation of all heads of each token by its position.
///
/// # Errors
/// [`Error::Mismatch`] for unsupported addresses, strides or channels; an error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`RopeArgs`] give, until the launched work has finished.
pub unsafe fn rope(stream: &Arc<CudaStream>, half: Half, args: &RopeArgs) -> Result<()> {
    let fits = |of: &RopeTensor| {
        let aligned = of.x.is_multiple_of(16) && of.out.is_multiple_of(16);
        aligned && of.token % 8 == 0 && of.head % 8 == 0
    };
    let rotary =
        args.rotary % 16 == 0 && (16..=args.head_dim.min(MAX_ROTARY)).contains(&args.rotary);
    if !args.tensors.iter().all(fits) || args.head_dim % 8 != 0 || !rotary {
        let got = format!("{args:?}");
        return Err(Error::mismatch("heads that rotate", "multiples of 16 bytes", got));
    }
    let name = if half == Half::F16 { "rope_f16" } else { "rope_bf16" };
    let kernel = IMAGE.kernel(stream.context(), name, THREADS, 0)?;
    // A thread has eight channels and their partners, or eight that do not rotate.
    let pieces = (args.head_dim / 8 - args.rotary / 16) as usize;
    let heads: usize = args.tensors.iter().map(|of| of.heads.max(0) as usize).sum();
    let grid = [args.tokens.max(0) as usize, (heads * pieces).div_ceil(THREADS as usize), 1];
    // SAFETY: the arguments are those of the kernel, which waits first, and the caller guarantees the
    // addresses.
    unsafe { kernel.launch_dependent(stream, grid, args) }?;
    Ok(())
}

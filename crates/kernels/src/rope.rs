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
    /// The arguments of [`rope`], with the same layout as in the kernels.
    ///
    /// Addresses are device addresses; strides count elements. All heads are aligned to 16 bytes.
    pub struct RopeArgs: 64, x_token at 32, tokens at 48 {
        /// `[tokens, heads, head_dim]`, f16 or bf16.
        pub x: u64,
        /// Output, shaped like `x`, contiguous.
        pub out: u64,
        /// `[tokens]`, i64.
        pub positions: u64,
        /// `[rotary / 2]`, f64: radians per position.
        pub frequencies: u64,
        /// Token stride of `x`.
        pub x_token: i64,
        /// Head stride of `x`.
        pub x_head: i64,
        /// Tokens.
        pub tokens: i32,
        /// Heads per token.
        pub heads: i32,
        /// Channels per head; a multiple of 8.
        pub head_dim: i32,
        /// Number of leading channels of a head that rotate; a multiple of 16, at most 256.
        pub rotary: i32,
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
    let aligned = [args.x, args.out].iter().all(|address| address % 16 == 0);
    let eights = [args.x_token, args.x_head].iter().all(|n| n % 8 == 0) && args.head_dim % 8 == 0;
    let rotary =
        args.rotary % 16 == 0 && (16..=args.head_dim.min(MAX_ROTARY)).contains(&args.rotary);
    if !aligned || !eights || !rotary {
        let got = format!("{args:?}");
        return Err(Error::mismatch("heads that rotate", "multiples of 16 bytes", got));
    }
    let name = if half == Half::F16 { "rope_f16" } else { "rope_bf16" };
    let kernel = IMAGE.kernel(stream.context(), name, THREADS, 0)?;
    let grid = [args.tokens.max(0) as usize, usize::from(args.heads > 0), 1];
    // SAFETY: the arguments are those of the kernel, and the caller guarantees the addresses.
    unsafe { kernel.launch(stream, grid, args) }?;
    Ok(())
}

//! The rotary position embedding: kernels/rope.cu.

use std::sync::Arc;

use super::Half;
use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("rope");

// As in the kernel.
const THREADS: u32 = 256;
const MOST_ROTARY: i32 = 256;

longctx_cuda::args! {
    /// The arguments of [`rope`], field for field those of the kernels.
    ///
    /// Addresses are device addresses; strides count elements. All heads begin at multiples of 16
    /// bytes.
    pub struct RopeArgs: 64, x_token at 32, tokens at 48 {
        /// `[tokens, heads, head_dim]`, f16 or bf16.
        pub x: u64,
        /// Output, as `x`, contiguous.
        pub out: u64,
        /// `[tokens]`, i64.
        pub positions: u64,
        /// `[rotary / 2]`, f64: radians per position.
        pub frequencies: u64,
        /// Stride of `x`'s tokens.
        pub x_token: i64,
        /// Stride of `x`'s heads.
        pub x_head: i64,
        /// Tokens.
        pub tokens: i32,
        /// Heads of a token.
        pub heads: i32,
        /// Channels of a head; a multiple of 8.
        pub head_dim: i32,
        /// The first channels of a head, which rotate; a multiple of 16, at most 256.
        pub rotary: i32,
    }
}

/// Launches the rotation of each token's heads by its position.
///
/// # Errors
/// [`Error::Mismatch`] for addresses, strides or channels that do not fit; the driver's.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`RopeArgs`] give, until the work that is launched here has ended.
pub unsafe fn rope(stream: &Arc<CudaStream>, half: Half, args: &RopeArgs) -> Result<()> {
    let aligned = [args.x, args.out].iter().all(|address| address % 16 == 0);
    let eights = [args.x_token, args.x_head].iter().all(|n| n % 8 == 0) && args.head_dim % 8 == 0;
    let rotary =
        args.rotary % 16 == 0 && (16..=args.head_dim.min(MOST_ROTARY)).contains(&args.rotary);
    if !aligned || !eights || !rotary {
        let got = format!("{args:?}");
        return Err(Error::mismatch("heads that rotate", "multiples of 16 bytes", got));
    }
    let name = if half == Half::F16 { "rope_f16" } else { "rope_bf16" };
    let kernel = IMAGE.kernel(stream.context(), name, THREADS, 0)?;
    let grid = [args.tokens.max(0) as usize, usize::from(args.heads > 0), 1];
    // SAFETY: the arguments are those of the kernel, and the caller vouches for the addresses.
    unsafe { kernel.launch(stream, grid, args) }?;
    Ok(())
}

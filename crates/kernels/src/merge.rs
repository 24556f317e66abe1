//! Merges attention over two disjoint sets of entries: kernels/merge.cu.

use std::sync::Arc;

use crate::{Error, Result};
use longctx_cuda::Image;
use longctx_cuda::cudarc::driver::CudaStream;

static IMAGE: Image = longctx_cuda::image!("merge");

/// Must equal the kernel's constant.
const THREADS: usize = 256;

longctx_cuda::args! {
    /// The arguments of [`merge_states`], with the same layout as in the kernel.
    ///
    /// Addresses are device addresses of contiguous f32 arrays: outputs `[rows, columns]`, natural
    /// log-sum-exps `[rows]`, which are -inf where nothing is seen. Rows are query heads of tokens.
    pub struct MergeArgs: 64, rows at 48 {
        /// Output of the first part.
        pub out_a: u64,
        /// Log-sum-exp of the first part.
        pub lse_a: u64,
        /// Output of the second part.
        pub out_b: u64,
        /// Log-sum-exp of the second part.
        pub lse_b: u64,
        /// Merged output. It may be that of a part.
        pub out: u64,
        /// Merged log-sum-exp. It must not be that of a part.
        pub lse: u64,
        /// Rows.
        pub rows: i64,
        /// Columns: head_dim, a multiple of 4.
        pub columns: i32,
        /// Padding.
        pub unused: i32,
    }
}

/// Launches the merge of two parts.
///
/// # Errors
/// [`Error::Mismatch`] for addresses or rows of outputs that are not multiples of 16 bytes; an error
/// of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes that the fields of
/// [`MergeArgs`] give, until the launched work has finished.
pub unsafe fn merge_states(stream: &Arc<CudaStream>, args: &MergeArgs) -> Result<()> {
    let outputs = [args.out_a, args.out_b, args.out];
    if outputs.iter().any(|address| address % 16 != 0) || args.columns % 4 != 0 {
        let got = format!("{args:?}");
        return Err(Error::mismatch("outputs to merge", "multiples of 16 bytes", got));
    }
    let kernel = IMAGE.kernel(stream.context(), "merge_states", THREADS as u32, 0)?;
    let blocks = (args.rows.max(0) as usize).div_ceil(THREADS / 32);
    // SAFETY: the arguments are those of the kernel, and the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [blocks, 1, 1], args) }?;
    Ok(())
}

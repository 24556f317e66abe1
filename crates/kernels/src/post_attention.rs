//! The part of a decoder between two attentions, in one launch: kernels/post_attention.cu.

use std::sync::Arc;

use crate::{Error, Half, MAX_ROWS, Result};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};
use longctx_cuda::{Image, compute_capability, max_shared_bytes, multiprocessors};

static IMAGE: Image = longctx_cuda::image!("post_attention");

// Must equal the kernel's constants.
const THREADS: u32 = 512;
const WARPS: usize = THREADS as usize / 32;
/// Bytes of a chunk of weights and of its barrier.
const CHUNK_BYTES: usize = 2 * 512 * 2 + 8;
/// Bytes of static shared memory, up to the alignment of the dynamic part.
const STATIC_BYTES: usize = 128;
/// More chunks in each warp's ring do not make the kernel faster.
const MAX_STAGES: usize = 6;
/// With fewer chunks, separate launches are faster.
const MIN_STAGES: usize = 2;

longctx_cuda::args! {
    /// The arguments of [`post_attention`], with the same layout as in the kernel.
    ///
    /// Addresses are device addresses of contiguous f16 or bf16 arrays, aligned to 16 bytes.
    pub struct PostAttentionArgs: 128, rows at 112 {
        /// The output of attention, `[rows, attention_size]`.
        pub attention: u64,
        /// The residual stream before attention, `[rows, hidden]`.
        pub residual: u64,
        /// The output projection, `[hidden, attention_size]`.
        pub output: u64,
        /// The weights of the feed-forward block's norm, `[hidden]`.
        pub norm: u64,
        /// The gate projection, followed by the up projection, `[2 inner, hidden]`.
        pub gate_up: u64,
        /// The down projection, `[hidden, inner]`.
        pub down: u64,
        /// The weights of the norm after the block, `[hidden]`.
        pub next_norm: u64,
        /// The projection after that norm, `[next_size, hidden]`.
        pub next: u64,
        /// Workspace: `[rows, hidden]`.
        pub middle: u64,
        /// Workspace: `[rows, inner]`.
        pub gated: u64,
        /// Output: the residual stream after the feed-forward block, `[rows, hidden]`.
        pub sum: u64,
        /// Output: the last projection, `[rows, next_size]`.
        pub y: u64,
        /// Channels of attention's output; a multiple of 8.
        pub attention_size: i32,
        /// Channels of the residual stream; a multiple of 8.
        pub hidden: i32,
        /// Channels of the feed-forward block; a multiple of 8.
        pub inner: i32,
        /// Outputs of the last projection.
        pub next_size: i32,
        /// Tokens: 1 to [`MAX_ROWS`].
        pub rows: i32,
        /// Chunks of weights that each warp copies ahead. [`post_attention`] chooses it.
        pub stages: i32,
        /// Added to the mean squares.
        pub eps: f32,
        /// Padding.
        pub unused: i32,
    }
}

/// Returns whether the device has the kernel of [`post_attention`], and shared memory for these
/// sizes. The kernel needs compute capability 9.0.
///
/// # Errors
/// An error of the CUDA driver.
pub fn has_post_attention(context: &CudaContext, args: &PostAttentionArgs) -> Result<bool> {
    Ok(stages(context, args)?.is_some())
}

/// Bytes of the input of the widest product.
fn input_bytes(args: &PostAttentionArgs) -> usize {
    let widest = args.attention_size.max(args.hidden).max(args.inner);
    2 * args.rows as usize * widest as usize
}

/// Returns the number of chunks in a warp's ring for which there is shared memory; `None` if the
/// kernel does not support the device or the sizes.
fn stages(context: &CudaContext, args: &PostAttentionArgs) -> Result<Option<usize>> {
    let sizes = [args.attention_size, args.hidden, args.inner];
    let fits = sizes.iter().all(|&n| n > 0 && n % 8 == 0)
        && args.next_size > 0
        && (1..=MAX_ROWS as i32).contains(&args.rows);
    if !fits || compute_capability(context)? < (9, 0) {
        return Ok(None);
    }
    let free = max_shared_bytes(context)? as usize;
    let stages = free.saturating_sub(STATIC_BYTES + input_bytes(args)) / (WARPS * CHUNK_BYTES);
    Ok((stages >= MIN_STAGES).then_some(stages.min(MAX_STAGES)))
}

/// Launches `middle = residual + attention outputᵀ`, `h = norm(middle)`,
/// `sum = middle + (silu(h gateᵀ) * (h upᵀ)) downᵀ` and `y = next_norm(sum) nextᵀ`.
///
/// The launch is cooperative, with a thread block on every multiprocessor. Products are accumulated
/// in f32. The results equal those of [`matvec`](crate::matvec), [`rms_norm`](crate::rms_norm) and
/// [`silu_mul`](crate::silu_mul) bit for bit.
///
/// # Errors
/// [`Error::Unsupported`] if [`has_post_attention`] is false; [`Error::Mismatch`] for addresses that
/// are not multiples of 16 bytes; an error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`PostAttentionArgs`] give, until the launched work has finished.
pub unsafe fn post_attention(
    stream: &Arc<CudaStream>,
    half: Half,
    args: &PostAttentionArgs,
) -> Result<()> {
    let context = stream.context();
    let Some(stages) = stages(context, args)? else {
        return Err(Error::Unsupported(format!("the kernel post_attention for {args:?}")));
    };
    let inputs = [args.attention, args.residual, args.output, args.norm, args.gate_up, args.down];
    let others = [args.next_norm, args.next, args.middle, args.gated, args.sum, args.y];
    if inputs.iter().chain(&others).any(|address| address % 16 != 0) {
        let got = format!("{args:?}");
        return Err(Error::mismatch("addresses", "multiples of 16 bytes", got));
    }
    let shared = (WARPS * stages * CHUNK_BYTES + input_bytes(args)) as u32;
    let kind = if half == Half::F16 { "f16" } else { "bf16" };
    let name = format!("post_attention_{kind}_r{}", (args.rows as usize).next_power_of_two());
    let kernel = IMAGE.kernel(context, &name, THREADS, shared)?;
    let args = PostAttentionArgs { stages: stages as i32, ..*args };
    // SAFETY: the arguments are those of the kernel, and the caller guarantees the addresses.
    unsafe { kernel.launch_cooperative(stream, [multiprocessors(context)?, 1, 1], &args) }?;
    Ok(())
}

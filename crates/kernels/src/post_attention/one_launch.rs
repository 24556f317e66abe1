//! The part between two attentions in one launch: kernels/post_attention.cu.

use std::sync::Arc;

use super::PostAttentionArgs;
use crate::{Half, Result};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};
use longctx_cuda::{Image, max_shared_bytes, multiprocessors};

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
/// For more tokens, separate launches are faster.
const MAX_ROWS: usize = 2;
/// For fewer weights, separate launches are faster.
const MIN_WEIGHT_BYTES: usize = 64 << 20;

longctx_cuda::args! {
    struct KernelArgs: 128, rows at 112 {
        attention: u64,
        residual: u64,
        output: u64,
        norm: u64,
        gate_up: u64,
        down: u64,
        next_norm: u64,
        next: u64,
        middle: u64,
        gated: u64,
        sum: u64,
        y: u64,
        attention_size: i32,
        hidden: i32,
        inner: i32,
        next_size: i32,
        rows: i32,
        stages: i32,
        eps: f32,
        unused: i32,
    }
}

/// Bytes of the input of the widest product.
fn input_bytes(args: &PostAttentionArgs) -> usize {
    2 * args.rows * args.attention_size.max(args.hidden).max(args.inner)
}

/// Returns the number of chunks in a warp's ring; `None` if separate launches are faster.
pub fn stages(context: &CudaContext, args: &PostAttentionArgs) -> Result<Option<usize>> {
    let columns = args.attention_size + 3 * args.inner + args.next_size;
    if args.rows > MAX_ROWS || 2 * args.hidden * columns < MIN_WEIGHT_BYTES {
        return Ok(None);
    }
    let free = max_shared_bytes(context)? as usize;
    let stages = free.saturating_sub(STATIC_BYTES + input_bytes(args)) / (WARPS * CHUNK_BYTES);
    Ok((stages >= MIN_STAGES).then_some(stages.min(MAX_STAGES)))
}

/// Launches a cooperative grid, with a thread block on every multiprocessor.
///
/// # Safety
/// As [`post_attention`](super::post_attention), for [`stages`] of these arguments.
pub unsafe fn launch(
    stream: &Arc<CudaStream>,
    half: Half,
    args: &PostAttentionArgs,
    stages: usize,
) -> Result<()> {
    let shared = (WARPS * stages * CHUNK_BYTES + input_bytes(args)) as u32;
    let kind = if half == Half::F16 { "f16" } else { "bf16" };
    let name = format!("post_attention_{kind}_r{}", args.rows);
    let kernel = IMAGE.kernel(stream.context(), &name, THREADS, shared)?;
    let of_kernel = KernelArgs {
        attention: args.attention,
        residual: args.residual,
        output: args.output,
        norm: args.norm,
        gate_up: args.gate_up,
        down: args.down,
        next_norm: args.next_norm,
        next: args.next,
        middle: args.workspace,
        gated: args.workspace + (2 * args.rows * args.hidden) as u64,
        sum: args.sum,
        y: args.y,
        attention_size: args.attention_size as i32,
        hidden: args.hidden as i32,
        inner: args.inner as i32,
        next_size: args.next_size as i32,
        rows: args.rows as i32,
        stages: stages as i32,
        eps: args.eps,
        unused: 0,
    };
    let blocks = multiprocessors(stream.context())?;
    let grid = [blocks, 1, 1];
    // SAFETY: the arguments are those of the kernel, and the caller guarantees the addresses. If it
    // starts early, the kernel waits before it reads activations and writes.
    unsafe { kernel.launch_cooperative(stream, grid, &of_kernel, args.prefetch) }?;
    Ok(())
}

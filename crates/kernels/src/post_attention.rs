//! The part of a decoder between two attentions.

mod one_launch;

use std::sync::Arc;

use crate::{
    Error, Half, MAX_SKINNY_ROWS, Result, RmsNormArgs, SkinnyGemmArgs, has_skinny_gemm, rms_norm,
    skinny_gemm,
};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};

/// The arguments of [`post_attention`]. Addresses are device addresses of contiguous f16 or bf16
/// arrays, aligned to 16 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PostAttentionArgs {
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
    /// Temporary memory of [`workspace`](Self::workspace) elements.
    pub workspace: u64,
    /// Output: the residual stream after the feed-forward block, `[rows, hidden]`.
    pub sum: u64,
    /// Output: the last projection, `[rows, next_size]`.
    pub y: u64,
    /// Channels of attention's output; a multiple of 8.
    pub attention_size: usize,
    /// Channels of the residual stream; a multiple of 8.
    pub hidden: usize,
    /// Channels of the feed-forward block; a multiple of 8.
    pub inner: usize,
    /// Outputs of the last projection.
    pub next_size: usize,
    /// Tokens: 1 to [`MAX_SKINNY_ROWS`].
    pub rows: usize,
    /// Added to the mean squares.
    pub eps: f32,
    /// Whether to read weights before the kernel before this one in the stream has ended.
    pub prefetch: bool,
}

impl PostAttentionArgs {
    /// Returns the number of elements of the workspace.
    pub fn workspace(&self) -> usize {
        self.rows * (3 * self.hidden + self.inner)
    }
}

/// Returns whether [`post_attention`] supports the device and these sizes. It needs compute capability
/// 9.0.
///
/// # Errors
/// An error of the CUDA driver.
pub fn has_post_attention(context: &CudaContext, args: &PostAttentionArgs) -> Result<bool> {
    let sizes = [args.attention_size, args.hidden, args.inner];
    let fits = sizes.iter().all(|&n| n > 0 && n % 8 == 0) && args.next_size > 0;
    Ok(fits && (1..=MAX_SKINNY_ROWS).contains(&args.rows) && has_skinny_gemm(context)?)
}

/// Launches `middle = residual + attention outputᵀ`, `h = norm(middle)`,
/// `sum = middle + (silu(h gateᵀ) * (h upᵀ)) downᵀ` and `y = next_norm(sum) nextᵀ`.
///
/// One or two rows of a large model take one launch, and the results equal those of separate calls of
/// [`matvec`](crate::matvec), [`rms_norm`] and [`silu_mul`](crate::silu_mul) bit for bit. Otherwise
/// there are six launches, and the results are those of separate calls with [`skinny_gemm`]. While a
/// product waits for its input, it reads weights.
///
/// # Errors
/// [`Error::Unsupported`] if [`has_post_attention`] is false; [`Error::Mismatch`] for addresses that
/// are not multiples of 16 bytes; an error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`PostAttentionArgs`] give, until the launched work has finished. Outputs and the
/// workspace must not overlap with inputs. With `prefetch`, no work that may still run at the start of
/// the kernel before this call may write weights.
pub unsafe fn post_attention(
    stream: &Arc<CudaStream>,
    half: Half,
    args: &PostAttentionArgs,
) -> Result<()> {
    if !has_post_attention(stream.context(), args)? {
        return Err(Error::Unsupported(format!("post_attention for {args:?}")));
    }
    check_aligned(args)?;
    if let Some(stages) = one_launch::stages(stream.context(), args)? {
        // SAFETY: guaranteed by the caller.
        return unsafe { one_launch::launch(stream, half, args, stages) };
    }
    let &PostAttentionArgs { hidden, rows, workspace, .. } = args;
    let part = |index: usize| workspace + (2 * rows * hidden * index) as u64;
    let (block, middle, normed, gated) = (part(0), part(1), part(2), part(3));
    let product = |w, (x, inner), (y, out), gated| SkinnyGemmArgs {
        w,
        x,
        y,
        inner,
        out,
        rows,
        gated,
        prefetch: true,
    };
    let norm = |x, weight, sum| RmsNormArgs {
        x,
        y: block,
        weight,
        sum,
        out: normed,
        columns: hidden as i32,
        eps: args.eps,
    };
    let output =
        product(args.output, (args.attention, args.attention_size), (block, hidden), false);
    let gate_up = product(args.gate_up, (normed, hidden), (gated, args.inner), true);
    let down = product(args.down, (gated, args.inner), (block, hidden), false);
    let next = product(args.next, (normed, hidden), (args.y, args.next_size), false);
    // SAFETY: the caller guarantees the addresses. The first product waits for all work before it, and
    // these launches write no weights, so the other products may read theirs early.
    unsafe {
        skinny_gemm(stream, half, &SkinnyGemmArgs { prefetch: args.prefetch, ..output })?;
        rms_norm(stream, half, rows, &norm(args.residual, args.norm, middle))?;
        skinny_gemm(stream, half, &gate_up)?;
        skinny_gemm(stream, half, &down)?;
        rms_norm(stream, half, rows, &norm(middle, args.next_norm, args.sum))?;
        skinny_gemm(stream, half, &next)
    }
}

fn check_aligned(args: &PostAttentionArgs) -> Result<()> {
    let inputs = [args.attention, args.residual, args.output, args.norm, args.gate_up, args.down];
    let others = [args.next_norm, args.next, args.workspace, args.sum, args.y];
    if inputs.iter().chain(&others).any(|address| address % 16 != 0) {
        let got = format!("{args:?}");
        return Err(Error::mismatch("addresses", "multiples of 16 bytes", got));
    }
    Ok(())
}

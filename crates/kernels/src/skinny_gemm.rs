//! Products of a matrix with the few rows of a decode step, on Hopper: kernels/skinny_gemm.cu.

use std::sync::Arc;

use crate::tensor_map::TensorMap;
use crate::{Error, Half, Result};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};
use longctx_cuda::{Image, Kernel, compute_capability, max_shared_bytes};

static IMAGE: Image = longctx_cuda::image!("skinny_gemm");

// Must equal the kernel's constants.
const THREADS: u32 = 160;
const WARPS: usize = 4;
const BOX: usize = 64;
const COLUMNS: usize = 64;
/// Bytes to align the ring.
const ALIGN: usize = 1024;
/// Bytes of a chunk's two barriers.
const BARRIERS: usize = 16;
/// Shared memory that is left to the norms and other small kernels that start during the product.
const SPARE: usize = 6 << 10;

/// The largest number of rows of one launch of [`skinny_gemm`].
pub const MAX_SKINNY_ROWS: usize = 32;

longctx_cuda::args! {
    struct KernelArgs: 32, tokens at 8 {
        y: u64,
        tokens: i32,
        outputs: i32,
        inner: i32,
        stages: i32,
        ahead: i32,
        unused: i32,
    }
}

/// The arguments of [`skinny_gemm`]. Addresses are device addresses of contiguous f16 or bf16 arrays,
/// aligned to 16 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SkinnyGemmArgs {
    /// `[out, inner]`; gated: `[2 out, inner]`, the gate projection, followed by the up projection.
    pub w: u64,
    /// `[rows, inner]`.
    pub x: u64,
    /// Output: `[rows, out]`.
    pub y: u64,
    /// Columns of `w` and `x`; a multiple of 8.
    pub inner: usize,
    /// Columns of `y`.
    pub out: usize,
    /// Rows of `x`: 1 to [`MAX_SKINNY_ROWS`].
    pub rows: usize,
    /// Whether the output is the activation of a gated feed-forward block, silu(gate) * up.
    pub gated: bool,
    /// Whether to read `w` before the kernel before this one in the stream has ended.
    pub prefetch: bool,
}

/// Returns whether the device has the kernels of [`skinny_gemm`]: compute capability 9.0.
///
/// # Errors
/// An error of the CUDA driver.
pub fn has_skinny_gemm(context: &CudaContext) -> Result<bool> {
    Ok(compute_capability(context)? == (9, 0))
}

/// Launches `y = x wᵀ`, or `y = silu(x gateᵀ) * (x upᵀ)` if `gated`, accumulated in f32. The gate and
/// the up projection are rounded before the activation.
///
/// # Errors
/// [`Error::Unsupported`] if [`has_skinny_gemm`] is false; [`Error::Mismatch`] for addresses or rows
/// that are not multiples of 16 bytes, or an unsupported number of rows; an error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`SkinnyGemmArgs`] give, until the launched work has finished. With `prefetch`, no
/// work that may still run at the start of the kernel before this one may write `w`.
pub unsafe fn skinny_gemm(
    stream: &Arc<CudaStream>,
    half: Half,
    args: &SkinnyGemmArgs,
) -> Result<()> {
    let &SkinnyGemmArgs { w, x, y, inner, out, rows, gated, prefetch } = args;
    if !has_skinny_gemm(stream.context())? {
        return Err(Error::Unsupported("skinny_gemm on this device".into()));
    }
    let aligned = [w, x, y].iter().all(|address| address % 16 == 0) && inner % 8 == 0;
    let sizes = [inner, out].iter().all(|&n| (1..=i32::MAX as usize / 4).contains(&n));
    if !aligned || !sizes || !(1..=MAX_SKINNY_ROWS).contains(&rows) {
        let expected = format!("1 to {MAX_SKINNY_ROWS} rows of multiples of 16 bytes");
        return Err(Error::mismatch("product", expected, format!("{args:?}")));
    }
    let tokens = rows.next_power_of_two().max(8);
    let rows_of_w = if gated { 2 * out } else { out };
    let kernel = match (gated, half) {
        (false, Half::F16) => "skinny_gemm_f16",
        (false, Half::BF16) => "skinny_gemm_bf16",
        (true, Half::F16) => "skinny_gemm_gated_f16",
        (true, Half::BF16) => "skinny_gemm_gated_bf16",
    };
    let shape = Shape::new(stream, kernel, tokens, rows_of_w.div_ceil(2 * BOX))?;
    let of_kernel = KernelArgs {
        y,
        tokens: rows as i32,
        outputs: out as i32,
        inner: inner as i32,
        stages: shape.stages as i32,
        ahead: if prefetch { shape.stages as i32 } else { 0 },
        unused: 0,
    };
    let map = |address, rows: usize, box_rows: usize| {
        let extents = [inner as u64, rows as u64];
        TensorMap::new(half, address, extents, [inner as u64], [COLUMNS as u32, box_rows as u32])
    };
    let maps = [map(w, rows_of_w, BOX)?, map(x, rows, tokens)?];
    let tiles = out.div_ceil(if gated { BOX } else { 2 * BOX });
    let blocks = shape.cluster * tiles.min(shape.clusters);
    // SAFETY: the arguments are those of the kernel, which waits before it reads x and writes y, and
    // without `prefetch` before it reads w; the caller guarantees the addresses.
    unsafe { shape.kernel.launch_dependent_with(stream, [blocks, 1, 1], &of_kernel, &maps) }?;
    Ok(())
}

/// A kernel with its clusters.
struct Shape {
    kernel: Kernel,
    /// Thread blocks of a cluster.
    cluster: usize,
    /// Clusters that run at the same time.
    clusters: usize,
    /// Chunks in the ring of a thread block.
    stages: usize,
}

impl Shape {
    /// Chooses the cluster size for which a product of `tiles` tiles takes the shortest time. `kernel`:
    /// the kernel's name without its numbers.
    fn new(stream: &Arc<CudaStream>, kernel: &str, tokens: usize, tiles: usize) -> Result<Self> {
        let free = max_shared_bytes(stream.context())? as usize - SPARE;
        let of = |cluster| Self::of(stream, kernel, (tokens, cluster), free);
        let (three, four) = (of(3)?, of(4)?);
        // All clusters run for as many rounds, and a round takes as long as a thread block's part.
        let time = |shape: &Self| tiles.div_ceil(shape.clusters) as f64 / shape.cluster as f64;
        Ok(if time(&three) < time(&four) { three } else { four })
    }

    /// `free`: bytes of shared memory.
    fn of(
        stream: &Arc<CudaStream>,
        kernel: &str,
        (tokens, cluster): (usize, usize),
        free: usize,
    ) -> Result<Self> {
        let stage = 2 * COLUMNS * (2 * BOX + tokens) + BARRIERS;
        // Two buffers of the partial sums of each warp that adds them, with a barrier.
        let partial = 512 * (cluster - 1) * tokens / 4 + 8;
        let fixed = ALIGN + 2 * WARPS.div_ceil(cluster) * partial;
        let stages = (free - fixed) / stage;
        let name = format!("{kernel}_t{tokens}_c{cluster}");
        let shared = (fixed + stages * stage) as u32;
        let kernel = IMAGE.kernel(stream.context(), &name, THREADS, shared)?;
        let clusters = kernel.clusters(stream, cluster)?.max(1);
        Ok(Self { kernel, cluster, clusters, stages })
    }
}

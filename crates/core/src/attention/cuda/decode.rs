//! A few queries over a long dense cache: kernels/attend.cu.

use crate::cuda::address;
use crate::{AttentionShape, AttentionState, Mask, Result};
use candle_core::{CudaDevice, DType, Tensor};
use longctx_cuda::{Image, multiprocessors};

static IMAGE: Image = longctx_cuda::image!("attend");
/// As in the kernel.
const THREADS: usize = 128;

longctx_cuda::args! {
    /// The arguments of the kernels.
    struct Args: 104, row at 64, tokens at 72, scale at 96 {
        q: u64,
        k: u64,
        v: u64,
        out: u64,
        lse: u64,
        part_out: u64,
        part_max: u64,
        part_sum: u64,
        row: i64,
        tokens: i32,
        columns: i32,
        queries: i32,
        splits: i32,
        causal: i32,
        window: i32,
        scale: f32,
        soft_cap: f32,
    }
}

/// One sequence's attention, as [`attend_one`](super::attend_one): split over entries, then joined.
/// `None` for head sizes and strides without a kernel.
pub fn attend(
    device: &CudaDevice,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Option<AttentionState>> {
    // The entries of a head lie one after the other, and all heads are equally far apart.
    let row = match *k.stride() {
        [token, row, 1] if token == shape.head_dim => row,
        _ => return Ok(None),
    };
    if v.stride() != k.stride() || !matches!(shape.head_dim, 64 | 128 | 256) {
        return Ok(None);
    }
    let (queries, tokens, d) = (q.dim(0)?, k.dim(0)?, shape.head_dim);
    let (rows, columns) = (shape.kv_heads, shape.group() * queries);
    let stream = device.cuda_stream();
    let of_block = if columns == 1 { 1 } else { columns.next_power_of_two().min(4) };
    let blocks = columns.div_ceil(of_block);
    let name = if k.dtype() == DType::BF16 { "bf16" } else { "f16" };
    let context = stream.context();
    let name = format!("attend_{name}_d{d}_c{of_block}");
    let kernel = IMAGE.kernel(context, &name, THREADS as u32, 0)?;
    let join = IMAGE.kernel(context, "join", d as u32, 0)?;
    let at_a_time = kernel.blocks_per_multiprocessor()? * multiprocessors(context)?;
    // One wave of blocks, and no block without tokens for all its threads.
    let busy = tokens.div_ceil(THREADS / (d / 16));
    let splits = (at_a_time / (rows * blocks)).clamp(1, busy);

    let q = q.to_dtype(k.dtype())?.transpose(0, 1)?.contiguous()?;
    // SAFETY: the kernels write all of these before anything reads them.
    let empty = |dims: &[usize]| unsafe { Tensor::empty(dims, DType::F32, q.device()) };
    let (out, lse) = (empty(&[shape.heads, queries, d])?, empty(&[shape.heads, queries])?);
    let parts = rows * splits * columns;
    let (part_out, part_max, part_sum) = (empty(&[parts, d])?, empty(&[parts])?, empty(&[parts])?);
    let args = Args {
        q: address(&q)?,
        k: address(k)?,
        v: address(v)?,
        out: address(&out)?,
        lse: address(&lse)?,
        part_out: address(&part_out)?,
        part_max: address(&part_max)?,
        part_sum: address(&part_sum)?,
        row: row as i64,
        tokens: tokens as i32,
        columns: columns as i32,
        queries: queries as i32,
        splits: splits as i32,
        causal: (mask == Mask::Causal).into(),
        window: shape.window.map_or(0, |window| window.min(1 << 30) as i32),
        scale: shape.scale,
        soft_cap: shape.soft_cap.unwrap_or(0.0),
    };
    // SAFETY: the tensors have the shapes and strides that `args` gives, those made above the sizes
    // that the kernels count with, and the stream runs one launch after the other and frees no
    // memory before they have used it.
    unsafe {
        kernel.launch(&stream, [splits, rows, blocks], &args)?;
        join.launch(&stream, [rows * columns, 1, 1], &args)?;
    }
    Ok(Some(AttentionState { out: out.transpose(0, 1)?, lse: lse.transpose(0, 1)? }))
}

//! A few queries over a long dense cache: kernels/attend.cu.

use crate::cuda::{Image, address, driver};
use crate::{AttentionShape, AttentionState, Mask, Result};
use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, DType, Tensor};

static IMAGE: Image = Image::new(include_bytes!(concat!(env!("OUT_DIR"), "/attend.fatbin")));
/// As in the kernel.
const THREADS: usize = 128;

/// Field for field what the kernels take. Pointers are device addresses.
#[repr(C)]
struct Args {
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

// SAFETY: plain numbers in C's layout, as the kernels read them.
unsafe impl DeviceRepr for Args {}

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
    let kernel = IMAGE.function(stream.context(), &format!("attend_{name}_d{d}_c{of_block}"))?;
    let join = IMAGE.function(stream.context(), "join")?;
    let per_sm = kernel
        .occupancy_max_active_blocks_per_multiprocessor(THREADS as u32, 0, None)
        .map_err(driver)? as usize;
    let sms = stream
        .context()
        .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        .map_err(driver)? as usize;
    // One wave of blocks, and no block without tokens for all its threads.
    let busy = tokens.div_ceil(THREADS / (d / 16));
    let splits = (per_sm * sms / (rows * blocks)).clamp(1, busy);

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
    let config = |grid_dim, threads: usize| LaunchConfig {
        grid_dim,
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: 0,
    };
    let grid = (splits as u32, rows as u32, blocks as u32);
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&args);
    // SAFETY: the tensors have the shapes and strides that `args` gives, those made above the sizes
    // that the kernels count with, and the stream runs one launch after the other and frees no
    // memory before they have used it.
    unsafe { launch.launch(config(grid, THREADS)) }.map_err(driver)?;
    let mut launch = stream.launch_builder(&join);
    launch.arg(&args);
    // SAFETY: as above.
    unsafe { launch.launch(config(((rows * columns) as u32, 1, 1), d)) }.map_err(driver)?;
    Ok(Some(AttentionState { out: out.transpose(0, 1)?, lse: lse.transpose(0, 1)? }))
}

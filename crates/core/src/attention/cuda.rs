//! A few queries over a dense cache on a CUDA device: kernels/attend.cu.

use crate::{AttentionShape, Error, Mask, Result};
use candle_core::cuda::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig, PushKernelArg, sys,
};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor, backend::BackendStorage};
use half::{bf16, f16};

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/attend.ptx"));
/// Query heads of a kv head times queries up to which every column may read the cache on its own: beyond, matrix products are faster.
const MOST_COLUMNS: usize = 16;
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
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Args {}

/// As [`attend`](super::attend); `None` where there is no kernel: other dtypes, head sizes, devices, or many queries.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Option<(Tensor, Tensor)>> {
    let (batch, queries) = (q.dim(0)?, q.dim(2)?);
    let (kv_batch, tokens) = (k.dim(0)?, k.dim(2)?);
    let columns = shape.group() * queries;
    let alike =
        kv_batch == batch && k.dtype() == v.dtype() && k.layout().stride() == v.layout().stride();
    let seen = tokens > 0 && queries > 0 && (mask != Mask::Causal || tokens >= queries);
    let kernels = matches!(k.dtype(), DType::F16 | DType::BF16)
        && shape.value_dim == shape.head_dim
        && matches!(shape.head_dim, 64 | 128 | 256)
        && columns <= MOST_COLUMNS;
    // The last rows of a grown cache lie apart from each other, but all equally far.
    let row = match *k.layout().stride() {
        [outer, row, token, 1] if token == shape.head_dim && outer == shape.kv_heads * row => row,
        _ => return Ok(None),
    };
    match k.device() {
        candle_core::Device::Cuda(device) if alike && seen && kernels => {
            let q = q.to_dtype(k.dtype())?.contiguous()?;
            launch(device, &q, k, v, row, shape, mask).map(Some)
        }
        _ => Ok(None),
    }
}

#[allow(unsafe_code)]
fn launch(
    device: &CudaDevice,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    row: usize,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<(Tensor, Tensor)> {
    let (batch, queries, tokens, d) = (q.dim(0)?, q.dim(2)?, k.dim(2)?, shape.head_dim);
    let (rows, columns, stream) =
        (batch * shape.kv_heads, shape.group() * queries, device.cuda_stream());
    let of_block = if columns == 1 { 1 } else { columns.next_power_of_two().min(4) };
    let blocks = columns.div_ceil(of_block);
    let name = if k.dtype() == DType::BF16 { "bf16" } else { "f16" };
    let kernel = device.get_or_load_custom_func(
        &format!("attend_{name}_d{d}_c{of_block}"),
        "longctx_core_attend",
        PTX,
    )?;
    let join = device.get_or_load_custom_func("join", "longctx_core_attend", PTX)?;
    let per_sm = kernel
        .occupancy_max_active_blocks_per_multiprocessor(THREADS as u32, 0, None)
        .map_err(wrap)? as usize;
    let sms = stream
        .context()
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        .map_err(wrap)? as usize;
    // One wave of blocks, and no block without tokens for all its threads.
    let busy = tokens.div_ceil(THREADS / (d / 16));
    let splits = (per_sm * sms / (rows * blocks)).clamp(1, busy);

    // SAFETY: the kernels write all of these before anything reads them.
    let alloc = |count| unsafe { stream.alloc::<f32>(count) }.map_err(wrap);
    let (out, lse) = (alloc(rows * columns * d)?, alloc(rows * columns)?);
    let parts = rows * splits * columns;
    let (part_out, part_max, part_sum) = (alloc(parts * d)?, alloc(parts)?, alloc(parts)?);
    let address = |x: &CudaSlice<f32>| x.device_ptr(&stream).0;
    with_addresses([q, k, v], &stream, |[q, k, v]| {
        let args = Args {
            q,
            k,
            v,
            out: address(&out),
            lse: address(&lse),
            part_out: address(&part_out),
            part_max: address(&part_max),
            part_sum: address(&part_sum),
            row: row as i64,
            tokens: tokens as i32,
            columns: columns as i32,
            queries: queries as i32,
            splits: splits as i32,
            causal: (mask == Mask::Causal) as i32,
            window: shape.window.unwrap_or(0) as i32,
            scale: shape.scale,
            soft_cap: shape.soft_cap.unwrap_or(0.0),
        };
        let config = |grid_dim, threads: usize| LaunchConfig {
            grid_dim,
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        let grid = (splits as u32, rows as u32, blocks as u32);
        let mut builder = kernel.builder();
        builder.arg(&args);
        // SAFETY: the tensors hold what `args` says of them, the buffers above have the sizes that the kernels count with, and the
        // stream runs the two launches one after the other.
        unsafe { builder.launch(config(grid, THREADS)) }.map_err(wrap)?;
        let mut builder = join.builder();
        builder.arg(&args);
        // SAFETY: as above.
        unsafe { builder.launch(config(((rows * columns) as u32, 1, 1), d)) }.map_err(wrap)?;
        Ok(())
    })?;
    let tensor = |x, shape: &[usize]| {
        let storage = CudaStorage::wrap_cuda_slice(x, device.clone());
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    };
    let out = tensor(out, &[batch, shape.heads, queries, d]);
    Ok((out, tensor(lse, &[batch, shape.heads, queries])))
}

/// Calls `f` with the device addresses of where the tensors, in f16 or bf16, begin.
fn with_addresses<const N: usize>(
    tensors: [&Tensor; N],
    stream: &CudaStream,
    f: impl FnOnce([u64; N]) -> Result<()>,
) -> Result<()> {
    let held = tensors.map(Tensor::storage_and_layout);
    let mut addresses = [0; N];
    for (address, (storage, layout)) in addresses.iter_mut().zip(&held) {
        let Storage::Cuda(storage) = &**storage else {
            return Err(Error::mismatch("tensor", "one on a CUDA device", "one elsewhere"));
        };
        let start = match storage.dtype() {
            DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(stream).0,
            _ => storage.as_cuda_slice::<f16>()?.device_ptr(stream).0,
        };
        *address = start + 2 * layout.start_offset() as u64;
    }
    f(addresses)
}

fn wrap(error: DriverError) -> Error {
    candle_core::Error::wrap(error).into()
}

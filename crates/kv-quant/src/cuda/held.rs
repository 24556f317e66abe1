//! What a store on a device holds: records, a ring, room for partial results.

use super::args::MoveArgs;
use super::kernels::{Kernels, Layout};
use super::wrap;
use crate::Format;
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::{CudaDevice, DType, Storage, Tensor};
use half::{bf16, f16};
use longctx_core::{Error, Result};
use std::sync::Arc;

/// Tokens that a source which is no ring may hold.
pub const NO_RING: i32 = 1 << 30;

/// What a store holds once it knows its batch and dtype.
#[derive(Debug, Clone)]
pub struct Held {
    pub batch: usize,
    /// Batch entries times kv heads.
    pub rows: usize,
    pub dtype: DType,
    /// `[rows][capacity]` records.
    pub packed: CudaSlice<u8>,
    pub capacity: usize,
    /// `[rows][ring][head_dim]`: token i lies at place `i % ring`.
    pub ring_k: CudaSlice<u16>,
    pub ring_v: CudaSlice<u16>,
    pub ring: usize,
    pub len: usize,
    /// Tokens whose keys are packed.
    pub keys: usize,
    /// Tokens that are read from records; those after them are read from the ring.
    pub values: usize,
    /// Tiles whose values are packed: the last may go beyond `values`.
    pub tiles: usize,
    pub scratch: Scratch,
}

/// Partial results of a launch's blocks.
#[derive(Debug, Clone)]
pub struct Scratch {
    pub out: CudaSlice<f32>,
    pub lse: CudaSlice<f32>,
    pub arrived: CudaSlice<u32>,
}

/// Two sources or targets of tokens, and how they lie there.
#[derive(Clone, Copy)]
pub struct Place {
    pub k: u64,
    pub v: u64,
    pub pitch: usize,
    pub start: usize,
    pub ring: i32,
}

impl Held {
    /// Of how many tokens keys and values should be packed.
    pub fn goal(&self, format: Format) -> (usize, usize) {
        let (keys, values) = format.ready(self.len - self.keys, self.len - self.values);
        (self.keys + keys, self.values + values)
    }

    /// Whether keys are packed, or to be packed, whose values are not.
    pub fn keys_ahead(&self, format: Format) -> bool {
        let (keys, values) = self.goal(format);
        keys > values
    }

    pub fn in_ring(&self, stream: &CudaStream, token: usize) -> Place {
        let (k, v) = (self.ring_k.device_ptr(stream).0, self.ring_v.device_ptr(stream).0);
        Place { k, v, pitch: self.ring, start: token % self.ring, ring: self.ring as i32 }
    }

    /// Makes room for so many records of each row.
    pub fn reserve(&mut self, device: &CudaDevice, layout: Layout, records: usize) -> Result<()> {
        if records <= self.capacity {
            return Ok(());
        }
        // A quarter more, so that growth is rare; new records are zero, since attention multiplies unseen ones by zero.
        let capacity = records.max(self.capacity + self.capacity / 4) + 1024 / layout.group;
        let (record, stream) = (layout.record(), device.cuda_stream());
        let mut grown = stream.alloc_zeros::<u8>(self.rows * capacity * record).map_err(wrap)?;
        let old = self.capacity * record;
        for row in 0..if old > 0 { self.rows } else { 0 } {
            let to = row * capacity * record;
            let mut to = grown.slice_mut(to..to + old);
            stream
                .memcpy_dtod(&self.packed.slice(row * old..(row + 1) * old), &mut to)
                .map_err(wrap)?;
        }
        (self.packed, self.capacity) = (grown, capacity);
        Ok(())
    }
}

impl Scratch {
    pub fn new(
        stream: &Arc<CudaStream>,
        parts: usize,
        head_dim: usize,
        blocks: usize,
    ) -> Result<Self> {
        // SAFETY: kernels write parts before they read them.
        let (out, lse) = unsafe { (stream.alloc(parts * head_dim), stream.alloc(parts)) };
        let arrived = stream.alloc_zeros(blocks).map_err(wrap)?;
        Ok(Self { out: out.map_err(wrap)?, lse: lse.map_err(wrap)?, arrived })
    }
}

pub fn kind(dtype: DType) -> i32 {
    (dtype == DType::BF16) as i32
}

/// Calls `f` with the device addresses of two contiguous f16 or bf16 tensors.
pub fn with_address<R>(
    k: &Tensor,
    v: &Tensor,
    stream: &CudaStream,
    f: impl FnOnce(u64, u64) -> Result<R>,
) -> Result<R> {
    let ((k, k_layout), (v, v_layout)) = (k.storage_and_layout(), v.storage_and_layout());
    let (Storage::Cuda(k), Storage::Cuda(v)) = (&*k, &*v) else {
        return Err(Error::mismatch("tensor", "one on a CUDA device", "one elsewhere"));
    };
    let (k_at, v_at) = (2 * k_layout.start_offset() as u64, 2 * v_layout.start_offset() as u64);
    if k.dtype() == DType::BF16 {
        let k = k.as_cuda_slice::<bf16>()?.device_ptr(stream);
        let v = v.as_cuda_slice::<bf16>()?.device_ptr(stream);
        f(k.0 + k_at, v.0 + v_at)
    } else {
        let k = k.as_cuda_slice::<f16>()?.device_ptr(stream);
        let v = v.as_cuda_slice::<f16>()?.device_ptr(stream);
        f(k.0 + k_at, v.0 + v_at)
    }
}

/// # Safety
/// Both places must hold `tokens` tokens of `rows` rows, and not overlap.
pub unsafe fn move_tokens(
    kernels: &Kernels,
    stream: &CudaStream,
    from: Place,
    to: Place,
    tokens: usize,
    rows: usize,
    pieces: usize,
) -> Result<()> {
    let args = MoveArgs {
        from_k: from.k,
        from_v: from.v,
        to_k: to.k,
        to_v: to.v,
        from_pitch: from.pitch as i64,
        to_pitch: to.pitch as i64,
        from_start: from.start as i32,
        from_ring: from.ring,
        to_start: to.start as i32,
        to_ring: to.ring,
        pieces: pieces as i32,
    };
    // SAFETY: the caller's.
    unsafe { kernels.move_tokens(stream, &args, tokens, rows) }
}

//! Device addresses of candle's tensors, for launches of kernels over them.

mod after_step;
mod graphs;
mod plan_memory;
mod scratch;

use std::sync::{Arc, OnceLock};

pub use after_step::after_step;
pub(crate) use after_step::{AfterStep, evict_after_step};
pub use graphs::{DecodeGraphs, Forward};
pub use plan_memory::{PlanLaunch, PlanMemory};
use scratch::Scratch;
pub use scratch::empty;

use crate::{Error, Result};
use candle_core::cuda::cudarc::driver::DevicePtr;
use candle_core::{DType, Device, Storage, Tensor, backend::BackendStorage};
use half::{bf16, f16};
use longctx_cuda::cudarc::driver::{CudaStream, DeviceRepr};
use longctx_cuda::{Uploaded, upload};
use longctx_kernels::Half;

/// Returns the device address of a tensor's first element. The dtype is u32, i64, f64, f32, f16 or
/// bf16. The address is valid as long as the tensor's memory.
///
/// # Errors
/// [`Error::Mismatch`] for a tensor on another device or of another dtype.
pub fn address(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::mismatch("tensor", "one on a CUDA device", "one elsewhere"));
    };
    let stream = storage.device().cuda_stream();
    let start = match storage.dtype() {
        DType::U32 => storage.as_cuda_slice::<u32>()?.device_ptr(&stream).0,
        DType::I64 => storage.as_cuda_slice::<i64>()?.device_ptr(&stream).0,
        DType::F64 => storage.as_cuda_slice::<f64>()?.device_ptr(&stream).0,
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        other => {
            let expected = "u32, i64, f64, f32, f16 or bf16";
            return Err(Error::mismatch("tensor", expected, other.as_str()));
        }
    };
    Ok(start + (layout.start_offset() * storage.dtype().size_in_bytes()) as u64)
}

/// Makes a CUDA device keep freed memory for later allocations, instead of returning it to the
/// system each time the process synchronizes with the device. Call it once in a program that has
/// the device to itself. No effect on other devices.
///
/// # Errors
/// An error of the CUDA driver.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    if let Device::Cuda(device) = device {
        longctx_cuda::keep_freed_memory(device.cuda_stream().context())?;
    }
    Ok(())
}

/// A list that layers with equal lengths share. The first of them copies it to the device.
#[derive(Debug)]
pub struct SharedList<T> {
    list: Vec<T>,
    uploaded: OnceLock<Uploaded>,
}

impl<T: DeviceRepr + Copy> SharedList<T> {
    /// Creates a list that is not on a device yet.
    pub fn new(list: Vec<T>) -> Self {
        Self { list, uploaded: OnceLock::new() }
    }

    /// Returns the device address of the list. All calls must use the same stream: its order
    /// guarantees that the copy precedes the kernels that read it.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn address(&self, stream: &Arc<CudaStream>) -> Result<u64> {
        if let Some(uploaded) = self.uploaded.get() {
            return Ok(uploaded.address());
        }
        let uploaded = upload(stream, &self.list)?;
        Ok(self.uploaded.get_or_init(|| uploaded).address())
    }

    /// Returns the elements.
    pub fn list(&self) -> &[T] {
        &self.list
    }
}

/// Returns the kernels' dtype for a tensor; `None` if they do not support its dtype.
pub fn half_of(x: &Tensor) -> Option<Half> {
    match x.dtype() {
        DType::F16 => Some(Half::F16),
        DType::BF16 => Some(Half::BF16),
        _ => None,
    }
}

/// Returns the number that represents an output's dtype in the arguments of attention kernels.
///
/// # Errors
/// [`Error::Mismatch`] unless it is f16, bf16 or f32.
pub fn out_kind(out: &Tensor) -> Result<i32> {
    match out.dtype() {
        DType::F16 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F32 => Ok(2),
        other => Err(Error::mismatch("dtype of the output", "f16, bf16 or f32", other.as_str())),
    }
}

/// Returns whether a kernel that reads contiguous rows of this format on this device can read a
/// tensor: it is contiguous and aligned to 16 bytes.
pub(crate) fn fits_kernel(x: &Tensor, half: Half, device: &Device) -> bool {
    let aligned = x.is_contiguous() && x.layout().start_offset().is_multiple_of(8);
    half_of(x) == Some(half) && aligned && x.device().same_device(device)
}

//! Device addresses of candle's tensors, for launches of kernels over them.

mod graphs;
mod plan_memory;

use std::sync::Arc;

pub use graphs::{DecodeGraphs, Forward};
pub use plan_memory::{PlanLaunch, PlanMemory};

use crate::{Batch, Error, Result};
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
/// system each time the process synchronizes with the device. A program that has the device to
/// itself calls it once. No effect on other devices.
///
/// # Errors
/// An error of the CUDA driver.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    if let Device::Cuda(device) = device {
        longctx_cuda::keep_freed_memory(device.cuda_stream().context())?;
    }
    Ok(())
}

/// A list of a step on a device. Layers whose sequences have equal lengths share it.
#[derive(Debug)]
pub struct SharedList<T> {
    /// Address of the stream that copies the list.
    stream: usize,
    list: Vec<T>,
    uploaded: Uploaded,
}

impl<T: DeviceRepr + Copy + PartialEq + Send + Sync + 'static> SharedList<T> {
    /// Returns the list that an earlier layer of the step has copied on the same stream, if it is
    /// equal; otherwise copies `list`.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn new(batch: &Batch, stream: &Arc<CudaStream>, list: Vec<T>) -> Result<Arc<Self>> {
        let address = stream.cu_stream() as usize;
        let equal = |of: &Self| of.stream == address && of.list == list;
        batch.shared(equal, || {
            let uploaded = upload(stream, &list)?;
            Ok(Self { stream: address, list: list.clone(), uploaded })
        })
    }

    /// Returns the device address of the list.
    pub fn address(&self) -> u64 {
        self.uploaded.address()
    }

    /// Returns the elements.
    pub fn list(&self) -> &[T] {
        &self.list
    }
}

/// Returns the kernels' name for a tensor's dtype; `None` if they do not support it.
pub fn half_of(x: &Tensor) -> Option<Half> {
    match x.dtype() {
        DType::F16 => Some(Half::F16),
        DType::BF16 => Some(Half::BF16),
        _ => None,
    }
}

/// Returns the number of an output's dtype in the arguments of attention kernels.
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

/// Returns whether a tensor of a [half format](Half) is contiguous and aligned to 16 bytes.
pub(crate) fn is_aligned(x: &Tensor) -> bool {
    x.is_contiguous() && x.layout().start_offset().is_multiple_of(8)
}

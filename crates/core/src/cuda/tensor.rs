//! Where candle's tensors lie.

use super::Half;
use crate::{Error, Result};
use candle_core::cuda::cudarc::driver::DevicePtr;
use candle_core::{DType, Device, Storage, Tensor, backend::BackendStorage};
use half::{bf16, f16};

/// The device address of a tensor's first number: u32, i64, f64, f32, f16 or bf16. It is
/// valid as long as the tensor's memory.
///
/// # Errors
/// [`Error::Mismatch`] for a tensor elsewhere or of another type.
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

/// Has a CUDA device keep the memory that tensors free for later ones, instead of giving it back to
/// the system each time the process waits for the device. A program that has the device to itself
/// calls it once. Other devices are left alone.
///
/// # Errors
/// The driver's.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    if let Device::Cuda(device) = device {
        longctx_cuda::keep_freed_memory(device.cuda_stream().context())?;
    }
    Ok(())
}

/// The kernels' name of a tensor's format; `None` if they don't serve it.
pub fn half_of(x: &Tensor) -> Option<Half> {
    match x.dtype() {
        DType::F16 => Some(Half::F16),
        DType::BF16 => Some(Half::BF16),
        _ => None,
    }
}

/// Whether a tensor of a [half format](Half) is contiguous and begins at a multiple of 16 bytes.
pub(crate) fn is_aligned(x: &Tensor) -> bool {
    x.is_contiguous() && x.layout().start_offset().is_multiple_of(8)
}

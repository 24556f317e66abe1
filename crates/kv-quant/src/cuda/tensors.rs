//! Tensors of candle as device addresses, and back.

use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor, op::BackpropOp};
use half::{bf16, f16};
use longctx_core::{Error, Result};

/// A dtype as kernels/args.cuh numbers them.
pub fn kind(dtype: DType) -> i32 {
    (dtype == DType::BF16) as i32
}

/// The device address of a contiguous tensor in f16, bf16 or f32. It is valid as long as the tensor.
pub fn address(x: &Tensor, stream: &CudaStream) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::mismatch("tensor", "one on a CUDA device", "one elsewhere"));
    };
    let base = match storage.dtype() {
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(stream).0,
        DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(stream).0,
        _ => storage.as_cuda_slice::<f32>()?.device_ptr(stream).0,
    };
    Ok(base + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
}

pub fn tensor<T: CudaDType>(device: &CudaDevice, x: CudaSlice<T>, shape: &[usize]) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(x, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

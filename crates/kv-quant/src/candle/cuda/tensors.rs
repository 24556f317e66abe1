//! Conversions between candle's tensors and device addresses.

use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor, op::BackpropOp};
use longctx_cuda::cudarc::driver::CudaSlice;

pub use longctx_core::cuda::address;

/// Returns the number of a dtype in kernels/args.cuh.
pub fn kind(dtype: DType) -> i32 {
    (dtype == DType::BF16) as i32
}

pub fn tensor<T: CudaDType>(device: &CudaDevice, x: CudaSlice<T>, shape: &[usize]) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(x, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

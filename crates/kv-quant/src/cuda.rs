//! Packed keys and values on candle's CUDA device, in a layout made for the tensor cores (kernels/layout.cuh).

mod args;
mod attend;
mod fill;
mod held;
mod kernels;
mod mass;
mod read;
mod status;
mod store;

pub use store::CudaStore;

/// A driver's error as candle's.
fn wrap(error: candle_core::cuda::cudarc::driver::DriverError) -> longctx_core::Error {
    candle_core::Error::wrap(error).into()
}

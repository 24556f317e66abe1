//! Packed keys and values of many sequences on candle's CUDA device, in records made for the tensor
//! cores (kernels/layout.cuh).

mod args;
mod attend;
mod edit;
mod fill;
mod head;
mod kernels;
mod plan;
mod pool;
mod read;
mod records;
mod status;
mod sums;
mod tensors;

pub use pool::CudaPool;

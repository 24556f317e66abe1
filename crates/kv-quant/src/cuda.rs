//! Packed keys and values of many sequences on candle's CUDA device, in records laid out for the
//! tensor cores (kernels/layout.cuh).

mod args;
mod attend;
mod edit;
mod fill;
mod half;
mod head;
mod kernels;
mod layout;
mod plan;
mod pool;
mod read;
mod records;
mod select;
mod status;
mod sums;
mod tensors;

pub use half::CudaHalf;
pub use pool::CudaPool;

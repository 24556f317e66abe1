//! Packed keys and values of many sequences on candle's CUDA device, by the kernels of
//! [`crate::cuda`].
#![allow(unsafe_code)]

mod append_step;
mod attend;
mod before_rope;
mod edit;
mod fill;
mod half;
mod head;
mod lens;
mod memory;
mod pool;
mod prepared;
mod read;
mod records;
mod select;
mod status;
mod sums;
mod tensors;
mod unpacked;

pub use before_rope::CudaBeforeRope;
pub use half::CudaHalf;
pub use pool::CudaPool;

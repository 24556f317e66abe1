//! Kernels on device addresses and a stream, without tensors: for engines that hold their memory
//! themselves. [`attention`](crate::attention) is the same over candle's tensors.
//!
//! Nothing here allocates device memory or waits for the device, and lengths are read from device
//! memory: a launch can be captured in a CUDA graph. Only the first launch in a context loads a
//! module, which a capture does not allow.
#![allow(unsafe_code)]

mod image;
pub mod paged;
mod prefill;

pub(crate) use image::driver;
pub use prefill::{Half, PAGE, PrefillArgs, has_prefill, prefill};

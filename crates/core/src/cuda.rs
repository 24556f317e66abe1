//! Kernels on device addresses and a stream, without tensors, for engines that manage device memory
//! themselves. [`attention`](crate::attention), [`Rope`](crate::Rope), [`linear`](crate::linear()),
//! [`add_rms_norm`](crate::add_rms_norm) and [`silu_mul`](crate::silu_mul()) are the same functions
//! over candle's tensors.
//!
//! No function here allocates device memory or synchronizes with the device, and lengths are read
//! from device memory, so a launch can be captured in a CUDA graph. The first launch in a context
//! loads a module, which a capture does not allow.
#![allow(unsafe_code)]

mod matvec;
pub mod paged;
mod prefill;
mod rms_norm;
mod rope;
mod silu_mul;
mod tensor;
mod top;

pub use matvec::{MAX_ROWS, MatVecArgs, matvec};
pub use prefill::{Half, PAGE, PrefillArgs, has_prefill, prefill};
pub use rms_norm::{RmsNormArgs, rms_norm};
pub use rope::{RopeArgs, rope};
pub use silu_mul::{SiluMulArgs, silu_mul};
pub(crate) use tensor::is_aligned;
pub use tensor::{address, half_of, keep_freed_memory};
pub use top::{TopRow, top};

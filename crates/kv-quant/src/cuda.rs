//! Kernels on device addresses and a stream, without tensors, for engines that manage device memory
//! themselves. With the feature `candle`, `QuantStore` is the same over candle's tensors. The
//! repository's `examples/cuda-raw` is a complete program.
//!
//! # Memory
//!
//! The caller allocates all memory. A kv head of a sequence has
//!
//! - *records*: blocks of [`Layout::group`] packed tokens, each of [`Layout::record`] bytes,
//!   anywhere in device memory, aligned to 16 bytes;
//! - a *block table*: the addresses of its records, u64;
//! - a *ring*: a ring buffer of its newest tokens in full precision, `[ring, head_dim]` in f16 or
//!   bf16, for keys and for values. Its capacity is the same for all heads, and can be 0 if every
//!   token is packed.
//!
//! Tokens of a kv head are in *slots*, numbered from 0: first those in records, then those in the
//! ring. A slot whose entry was evicted is a *hole*; see [`KvHead::valid`].
//!
//! # Calls
//!
//! 1. [`Layout::new`] and [`Kernels::load`], once.
//! 2. [`Kernels::pack`] packs whole records from a tensor of new tokens or from the rings;
//!    [`Kernels::fill_rings`] copies new tokens to the rings.
//! 3. [`Kernels::attend`] selects a kernel; [`AttendKernel::plan`] splits the records of all
//!    sequences over the device, from lengths that the host knows; [`AttendKernel::launch`]
//!    computes attention. [`Kernels::sums`] then gives the attention that each token received.
//! 4. [`Kernels::unpack`] reads packed tokens; [`Kernels::compact_rings`] removes tokens from the
//!    rings.
//!
//! No function here allocates device memory or synchronizes with the device. A launch reads its
//! [`Work`] or [`FillRow`]s, tables and lengths from device memory, so it can be captured in a CUDA
//! graph. A captured launch of attention is replayed for other sequences and lengths by writing a
//! new list of the same length to the same memory: [`Plan::padded`] extends a plan to the length
//! [`AttendKernel::max_work`]. [`Kernels::load`] loads modules, which a capture does not allow.
#![allow(unsafe_code)]

mod args;
mod kernels;
mod layout;
mod plan;
mod report;

pub use args::{AttendArgs, CompactRow, FillArgs, FillRow, KvHead, UnpackArgs, Work};
pub use kernels::{AttendKernel, Kernels};
pub use layout::Layout;
#[cfg(feature = "candle")]
pub(crate) use layout::needs;
pub use longctx_cuda::{self, Error, Result};
pub use plan::Plan;
#[cfg(feature = "candle")]
pub(crate) use plan::Sizes;
pub use report::Report;

/// Tokens of a tile, the unit in which values are packed.
pub const TILE: usize = 32;

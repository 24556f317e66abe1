#![doc = include_str!("../README.md")]

mod attention;
mod bit_packing;
mod error;
#[cfg(feature = "save")]
mod file;
mod format;
mod hadamard;
mod kernel;
mod layout;
mod levels;
mod number;
mod packed;
mod pool;
mod product;
mod quantize;
mod rotary;

#[cfg(feature = "candle")]
mod candle;
#[cfg(feature = "cuda")]
pub mod cuda;

pub use half;
#[cfg(feature = "candle")]
pub use longctx_core;

pub use attention::{AttentionOutput, Mask, Queries};
#[cfg(feature = "candle")]
pub use candle::{DequantCache, Order, QuantCache, QuantStore};
#[cfg(all(feature = "candle", feature = "save"))]
pub use candle::{load_caches, save_caches};
pub use error::{Error, Position, Result};
#[cfg(feature = "save")]
pub use file::{CacheFile, save, to_bytes};
pub use format::{
    Axis, Bits, Codes, Float8, Flush, Format, KeyBasis, Scheme, StaticScale, TurboQuant,
};
pub use number::Number;
pub use packed::Packed;
pub use pool::{Pool, PoolBytes, PoolShape};
pub use quantize::Quantizer;
pub use rotary::Rotary;

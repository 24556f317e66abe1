#![doc = include_str!("../README.md")]

mod array;
mod attention;
mod error;
mod format;
mod head;
mod kernel;
mod number;
mod packed;
mod product;
mod quantize;
mod residual;
mod vector;

#[cfg(feature = "candle")]
mod candle;

pub use attention::{Attended, Queries, attend, mass};
#[cfg(feature = "candle")]
pub use candle::{QuantCache, QuantStore};
pub use error::{Error, Result};
pub use format::{Axis, Bits, Flush, Format, Scheme};
pub use head::{Head, HeadBytes};
pub use number::Number;
pub use packed::Packed;
pub use quantize::Quantizer;

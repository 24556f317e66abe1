#![doc = include_str!("../README.md")]

#[cfg(feature = "driver")]
mod args;
#[cfg(feature = "build")]
pub mod build;
#[cfg(feature = "driver")]
mod device;
#[cfg(feature = "driver")]
mod error;
#[cfg(feature = "driver")]
mod image;
#[cfg(feature = "driver")]
mod kernel;
#[cfg(feature = "driver")]
mod staging;
#[cfg(feature = "driver")]
mod upload;

#[cfg(feature = "driver")]
pub use args::Number;
#[cfg(feature = "driver")]
pub use cudarc;
#[cfg(feature = "driver")]
pub use device::{compute_capability, keep_freed_memory, max_shared_bytes, multiprocessors};
#[cfg(feature = "driver")]
pub use error::{Error, Result};
#[cfg(feature = "driver")]
pub use image::Image;
#[cfg(feature = "driver")]
pub use kernel::Kernel;
#[cfg(feature = "driver")]
pub use staging::Staging;
#[cfg(feature = "driver")]
pub use upload::{Upload, Uploaded, bytes_of, upload};

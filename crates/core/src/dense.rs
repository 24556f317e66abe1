//! The dense store and cache: every key and value in f32, f16 or bf16.

mod cache;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod growing;
mod pages;
mod pool;
mod slab;
mod store;

pub use cache::{DenseCache, DenseStrategy};
pub use store::DenseStore;

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod files;
#[cfg(feature = "hub")]
mod hub;
mod pickle;
mod pth;
mod read_tensors;
mod shards;
mod tokenizer;

#[cfg(feature = "hub")]
pub use hub::HubModel;
pub use pth::Pth;
pub use read_tensors::ReadTensors;
pub use shards::{shard_names, weight_files};
pub use tokenizer::{open_tokenizer, read_tokenizer};

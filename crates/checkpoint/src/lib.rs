#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod files;
#[cfg(feature = "hub")]
mod hub;
mod pickle;
mod pth;
mod read_tensors;
mod safetensors;
mod shards;
mod tokenizer;

#[cfg(feature = "hub")]
pub use hub::HubRepo;
pub use pth::Pth;
pub use read_tensors::ReadTensors;
pub use safetensors::map_safetensors;
pub use shards::{shard_names, weight_files};
pub use tokenizer::{open_tokenizer, read_tokenizer, unpanicked};

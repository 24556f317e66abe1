#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod files;
mod pickle;
mod pth;
mod read_tensors;
mod shards;
mod tokenizer;

pub use pth::Pth;
pub use read_tensors::ReadTensors;
pub use shards::shard_names;
pub use tokenizer::{open_tokenizer, read_tokenizer};

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod asked;
mod pickle;
mod pth;
mod shards;
mod tokenizer;

pub use asked::Asked;
pub use pth::Pth;
pub use shards::shard_names;
pub use tokenizer::{open_tokenizer, read_tokenizer};

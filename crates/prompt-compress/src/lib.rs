#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod baseline;
mod structured;
mod units;

pub use structured::{Section, StructuredPrompt};
pub use units::{sentences, words};

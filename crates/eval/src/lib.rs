#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod error;
mod haystack;
pub mod metric;
pub mod needle;
mod python;
mod task;

pub use error::{Error, Result};
pub use haystack::Haystack;
pub use task::{
    Category, CountTokens, Length, NeedleGrid, Sample, Samples, Score, Task, long_generation,
    longbench, truncate_middle,
};

#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod error;
mod haystack;
mod measure;
pub mod memory;
pub mod metric;
pub mod needle;
mod python;
pub mod report;
mod run;
pub mod setting;
mod task;

pub use error::{Error, Result};
pub use haystack::{Haystack, word_range};
pub use measure::{Agreement, Forced};
pub use run::{
    Answer, Event, Fault, Limits, Manifest, Methods, Plan, Question, Reader, Record, Shard,
    Subject, Summary, Text, Timings, content_hash, records, run,
};
pub use setting::{Setting, Template};
pub use task::{
    Category, CountTokens, Length, NeedleGrid, Sample, Samples, Score, Task, long_generation,
    longbench, truncate_middle,
};

#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod error;
mod haystack;
mod measure;
pub mod memory;
pub mod metric;
pub mod needle;
mod punkt;
mod python;
pub mod report;
mod run;
pub mod setting;
pub mod statistics;
mod task;

pub use error::{Error, Result};
pub use haystack::{Haystack, word_range};
pub use measure::{Agreement, Forced};
#[cfg(feature = "http")]
pub use run::Server;
pub use run::{
    Answer, Event, Fault, Limits, Manifest, Methods, Passage, Plan, Question, Queue, Reader,
    Record, Shard, Subject, Summary, Text, Timings, content_hash, records, run,
};
pub use setting::{Setting, Template};
pub use task::{
    Category, CountTokens, Length, LongBenchV2, NeedleGrid, Sample, Samples, Score, Task,
    long_generation, longbench, ruler, truncate_middle,
};

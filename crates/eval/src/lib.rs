#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod agreement;
mod error;
mod haystack;
pub mod metric;
pub mod needle;
pub mod peak_memory;
mod punkt;
mod python;
#[cfg(feature = "report")]
pub mod report;
mod run;
pub mod setting;
pub mod statistics;
mod task;

pub use longctx_core;

pub use agreement::{Agreement, TeacherForced};
pub use error::{Error, Result};
pub use haystack::{Haystack, word_range};
#[cfg(feature = "http")]
pub use run::Server;
pub use run::{
    Answer, Event, Limits, Manifest, Methods, Passage, Plan, Question, Queue, Reader, Record,
    Shard, Subject, SubjectError, Summary, Text, Timings, content_hash, records, run,
};
pub use setting::{Setting, Template};
pub use task::{
    Category, CountTokens, Length, LongBenchV2, NeedleGrid, Sample, Samples, Score, Task,
    long_generation, longbench, ruler, truncate_middle,
};

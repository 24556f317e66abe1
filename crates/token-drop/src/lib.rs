#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod streaming_llm;

pub use streaming_llm::StreamingLlm;

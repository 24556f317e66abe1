#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod baseline;
#[cfg(feature = "hub")]
mod hub;
pub mod llmlingua2;
mod percentile;
mod structured;
mod tokens;
mod units;

pub use llmlingua2::LlmLingua2;
pub use structured::{Section, StructuredPrompt};
pub use tokens::cl100k_tokens;
pub use units::{sentences, words};

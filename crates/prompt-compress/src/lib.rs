#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod baseline;
#[cfg(feature = "hub")]
mod hub;
pub mod llmlingua;
pub mod llmlingua2;
mod loss;
mod percentile;
mod selective_context;
mod structured;
mod target;
mod tokens;
mod units;

pub use longctx_core;

pub use llmlingua::LlmLingua;
pub use llmlingua2::LlmLingua2;
pub use selective_context::{SelectiveContext, Unit};
pub use structured::{Section, StructuredPrompt};
pub use target::Target;
pub use tokens::cl100k_tokens;
pub use units::{sentences, words};

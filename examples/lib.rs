//! What several examples share: methods by name, models by name, models as subjects of an
//! evaluation, one prefill for several caches, a model's head scores, prompt compressors, output
//! that a reader may leave.

/// The page for engine authors, so that its examples are compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../docs/engines.md")]
mod engines {}

pub use longctx_eval::memory;
pub mod encoder;
pub mod heads;
pub mod llm;
pub mod methods;
pub mod model;
pub mod output;
pub mod place;
pub mod selective_context;
pub mod shared_prefill;
pub mod subject;

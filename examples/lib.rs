//! What several examples share: methods by name, models by name, models as subjects of an
//! evaluation, one prefill for several caches, a model's head scores, prompt compressors, output
//! that a reader may leave.

/// Pages of the book, so that their examples are compiled and run.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../docs/contributing.md")]
    mod contributing {}
    #[doc = include_str!("../docs/engines.md")]
    mod engines {}
    #[doc = include_str!("../docs/kv-quant-candle.md")]
    mod kv_quant_candle {}
    #[doc = include_str!("../docs/kv-quant-slices.md")]
    mod kv_quant_slices {}
    #[doc = include_str!("../README.md")]
    mod readme {}
    #[doc = include_str!("../docs/start.md")]
    mod start {}
}

pub use longctx_eval::peak_memory;
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

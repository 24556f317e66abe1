//! Functions shared by several examples: methods and models by name, models as subjects of an
//! evaluation, one prefill for several caches, a model's head scores, prompt compressors, and
//! output that tolerates a closed pipe.

/// Pages of the book, whose code examples are compiled and run as doctests.
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
pub mod shapes;
pub mod shared_prefill;
pub mod subject;

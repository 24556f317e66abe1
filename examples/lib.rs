//! What several examples share: methods by name, models by name, models as subjects of an
//! evaluation, one prefill for several caches, a model's head scores, prompt compressors, output
//! that a reader may leave.

pub use longctx_eval::memory;
pub mod encoder;
pub mod heads;
pub mod llm;
pub mod methods;
pub mod model;
pub mod output;
pub mod selective_context;
pub mod shared_prefill;
pub mod subject;

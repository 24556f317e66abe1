//! What several examples need: several caches behind one prompt, a model that fetches itself, an
//! encoder by name, Selective-Context, scores of a model's heads, models of any family by name,
//! models as subjects of an evaluation, output that a reader may leave, the process's memory.

pub use longctx_eval::memory;
pub mod encoder;
pub mod fan;
pub mod heads;
pub mod llm;
pub mod model;
pub mod output;
pub mod selective_context;
pub mod subject;

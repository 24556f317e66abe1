//! What several examples need: a model that fetches itself, models of any family by name, models as subjects of an evaluation, the process's memory.

pub use longctx_eval::memory;
pub mod llm;
pub mod model;
pub mod subject;

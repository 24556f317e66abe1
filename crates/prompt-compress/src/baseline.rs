//! Compressors that need no model: baselines for all other methods.

mod extract;
mod middle;
mod random;
mod rank;

pub use extract::{Extract, Ranking};
pub use middle::TruncateMiddle;
pub use random::RandomDrop;
pub use rank::{bm25, tf_idf};

//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys that contain their values.

mod cache;
mod store;

pub use cache::{LatentCache, LatentStrategy};
pub use store::LatentStore;
pub(crate) use store::check_shape;

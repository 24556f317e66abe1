//! One small file per policy: how it scores.

pub mod h2o;
pub mod k_norm;
pub mod random;
pub mod recent;
pub mod snap_kv;
pub mod tova;
mod window;

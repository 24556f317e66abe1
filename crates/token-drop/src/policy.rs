//! One small file per policy: how it scores.

pub mod duo_attention;
pub mod expected_attention;
pub mod finch;
pub mod h2o;
pub mod k_norm;
pub mod key_diff;
pub mod lag_kv;
pub mod random;
pub mod recent;
pub mod snap_kv;
pub mod tova;
mod window;

//! Functions shared by several benchmarks. Each benchmark is a file in this folder: `cargo bench -p
//! longctx-benches --bench NAME`.

pub mod candle;
pub mod recurrent;

use anyhow::Result;
use candle_core::{Device, Tensor};

/// Returns `count` token ids below `vocab`, the same in every run.
pub fn ids(count: usize, vocab: u32) -> Vec<u32> {
    // Multiplying by a prime spreads the ids over the vocabulary without a random generator.
    (0..count as u32).map(|i| i.wrapping_mul(7919) % vocab).collect()
}

/// Returns the same ids as a tensor for candle's models, `[1, count]`.
///
/// # Errors
/// Errors of candle.
pub fn tokens(count: usize, vocab: u32) -> Result<Tensor> {
    Ok(Tensor::new(ids(count, vocab), &Device::Cpu)?.unsqueeze(0)?)
}

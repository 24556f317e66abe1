//! What several benchmarks need. Each benchmark is a file beside this one: `cargo bench -p
//! longctx-benches --bench NAME`.

pub mod candle;
pub mod recurrent;

use anyhow::Result;
use candle_core::{Device, Tensor};

/// So many token ids below `vocab`, the same ones in every run.
pub fn ids(count: usize, vocab: u32) -> Vec<u32> {
    // A full-period step through the ids: no token repeats for long, and nothing depends on a
    // random generator.
    (0..count as u32).map(|i| i.wrapping_mul(7919) % vocab).collect()
}

/// The same as candle's models take them, `[1, count]`.
///
/// # Errors
/// candle's.
pub fn tokens(count: usize, vocab: u32) -> Result<Tensor> {
    Ok(Tensor::new(ids(count, vocab), &Device::Cpu)?.unsqueeze(0)?)
}

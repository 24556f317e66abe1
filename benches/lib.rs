//! What several benchmarks need. Each benchmark is a file beside this one: `cargo bench -p longctx-benches --bench NAME`.

pub mod candle;
pub mod recurrent;

use anyhow::Result;
use candle_core::{Device, Tensor};

/// `[1, count]` token ids below `vocab`, the same ones in every run.
///
/// # Errors
/// candle's.
pub fn tokens(count: usize, vocab: u32) -> Result<Tensor> {
    // A full-period step through the ids: no token repeats for long, and nothing depends on a random generator.
    let ids: Vec<u32> = (0..count as u32).map(|i| i.wrapping_mul(7919) % vocab).collect();
    Ok(Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?)
}

//! What several benchmarks need. Each benchmark is a file beside this one: `cargo bench -p
//! longctx-benches --bench NAME`.

pub mod candle;
pub mod recurrent;

use anyhow::Result;
use base_models::{Config, RopeSettings};
use candle_core::{Device, Tensor};
use longctx_core::RopeScaling;

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

/// The shape of Llama-3-8B.
pub fn llama_3_8b() -> Config {
    Config {
        family: "llama".into(),
        vocab_size: 128_256,
        hidden_size: 4096,
        intermediate_size: 14_336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        norm_eps: 1e-5,
        rope: RopeSettings { theta: 500_000.0, rotary_dims: 128, scaling: RopeScaling::None },
        context_length: 1 << 20,
        ..Config::default()
    }
}

//! Functions shared by several benchmarks. Each benchmark is a file in this folder: `cargo bench -p
//! longctx-benches --bench NAME`.

pub mod candle;
pub mod recurrent;

use anyhow::Result;
use base_models::{Config, RopeSettings};
use candle_core::{Device, Tensor};
use longctx_core::RopeScaling;

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

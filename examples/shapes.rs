//! Shapes of known models, for random weights.

use base_models::{Config, RopeSettings};
use longctx_core::RopeScaling;

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

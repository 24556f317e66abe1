//! SmolLM3: Llama with layers that have no rotary embedding.

use super::{
    Architecture, DEFAULTS, Defaults, attention_biases, llama, rope, window, windows_by_type,
};
use crate::config::Config;
use crate::json::Fields;
use longctx_core::{Error, Result};

/// Every `INTERVAL`-th layer has no rotary embedding.
const INTERVAL: usize = 4;

pub(super) const SMOLLM3: Architecture = Architecture {
    name: "smollm3",
    defaults: Defaults {
        kv_heads: Some(4),
        context: 32_768,
        theta: 2_000_000.0,
        tied_embeddings: true,
        bos: Some(128_000),
        eos: &[128_001],
        ..DEFAULTS
    },
    read: smollm3,
    read_gguf: |_, config| {
        config.unrotated = every(config.layers, INTERVAL);
        Ok(())
    },
    gguf_settings: &[],
    ..llama::LLAMA
};

fn every(layers: usize, interval: usize) -> Vec<usize> {
    (0..layers).filter(|layer| (layer + 1).is_multiple_of(interval.max(1))).collect()
}

fn smollm3(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &SMOLLM3.defaults)?;
    config.mlp_bias = raw.switch("mlp_bias")?.unwrap_or(false);
    config.unrotated = match raw.numbers("no_rope_layers")? {
        Some(rotates) if rotates.len() < config.layers => {
            let expected = format!("{} entries", config.layers);
            return Err(Error::mismatch("no_rope_layers", expected, rotates.len()));
        }
        Some(rotates) => (0..config.layers).filter(|&layer| rotates[layer] == 0).collect(),
        None => {
            let interval = raw.number("no_rope_layer_interval")?.unwrap_or(INTERVAL);
            every(config.layers, interval)
        }
    };
    let used = raw.switch("use_sliding_window")?.unwrap_or(false);
    let window = window(raw, None)?.filter(|_| used);
    config.windows = match windows_by_type(raw, config.layers, window)? {
        Some(windows) => windows,
        // Layers without a rotary embedding have the sliding window.
        None => {
            (0..config.layers).map(|l| window.filter(|_| config.unrotated.contains(&l))).collect()
        }
    };
    attention_biases(raw, config)
}

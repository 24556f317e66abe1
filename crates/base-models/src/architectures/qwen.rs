//! Qwen2, Qwen2.5 and Qwen3, dense and with experts.

use super::{
    Architecture, DEFAULTS, Defaults, GGUF_EXPERTS_WINDOW, GGUF_WINDOW, attention_biases,
    gguf_experts, rope, window, windows_by_type,
};
use crate::config::{Config, Experts, QkNorm};
use crate::gguf_settings::Settings;
use crate::json::Fields;
use crate::names;
use longctx_core::Result;

pub(super) const QWEN2: Architecture = Architecture {
    name: "qwen2",
    defaults: Defaults { kv_heads: Some(32), context: 32_768, bos: None, eos: &[], ..DEFAULTS },
    read: qwen2,
    read_gguf: no_window,
    gguf_settings: &[GGUF_WINDOW],
    folder_names: names::LLAMA,
    gguf_names: names::GGUF,
    gguf_interleaved: false,
};

fn qwen2(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &QWEN2.defaults)?;
    config.windows = windows(raw, config.layers)?;
    config.qkv_bias = true;
    Ok(())
}

pub(super) const QWEN3: Architecture = Architecture {
    name: "qwen3",
    defaults: Defaults { head_dim: Some(128), ..QWEN2.defaults },
    read: qwen3,
    read_gguf: |file, config| {
        config.qk_norm = QkNorm::PerHead;
        no_window(file, config)
    },
    ..QWEN2
};

fn qwen3(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &QWEN3.defaults)?;
    config.windows = windows(raw, config.layers)?;
    config.qk_norm = QkNorm::PerHead;
    attention_biases(raw, config)
}

pub(super) const QWEN3_MOE: Architecture = Architecture {
    name: "qwen3_moe",
    defaults: Defaults { kv_heads: Some(4), ..QWEN2.defaults },
    read: qwen3_moe,
    read_gguf: |file, config| {
        config.experts = Some(gguf_experts(file, config, true)?);
        (QWEN3.read_gguf)(file, config)
    },
    gguf_settings: GGUF_EXPERTS_WINDOW,
    ..QWEN2
};

/// llama.cpp's name of the architecture.
pub(super) const GGUF_QWEN3_MOE: Architecture = Architecture { name: "qwen3moe", ..QWEN3_MOE };

fn qwen3_moe(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &QWEN3_MOE.defaults)?;
    config.qk_norm = QkNorm::PerHead;
    let slides = raw.switch("use_sliding_window")?.unwrap_or(false);
    config.windows = vec![window(raw, Some(4096))?.filter(|_| slides); config.layers];
    // Every `step`-th layer is a mixture of experts, except the listed ones.
    let step = raw.number("decoder_sparse_step")?.unwrap_or(1).max(1);
    let listed = raw.numbers("mlp_only_layers")?.unwrap_or_default();
    let dense = |layer: &usize| listed.contains(layer) || !(layer + 1).is_multiple_of(step);
    config.experts = Some(Experts {
        count: raw.either_number("num_experts", "num_local_experts")?.unwrap_or(128),
        per_token: raw.number("num_experts_per_tok")?.unwrap_or(8),
        intermediate_size: raw.number("moe_intermediate_size")?.unwrap_or(768),
        normalize: raw.switch("norm_topk_prob")?.unwrap_or(false),
        dense_layers: (0..config.layers).filter(dense).collect(),
        ..Experts::default()
    });
    attention_biases(raw, config)
}

/// Reads sliding windows: none unless `use_sliding_window` is set; otherwise by `layer_types`, or
/// from a certain layer on.
fn windows(raw: &Fields, layers: usize) -> Result<Vec<Option<usize>>> {
    let used = raw.switch("use_sliding_window")?.unwrap_or(false);
    let Some(window) = window(raw, Some(4096))?.filter(|_| used) else {
        return Ok(vec![None; layers]);
    };
    if let Some(windows) = windows_by_type(raw, layers, Some(window))? {
        return Ok(windows);
    }
    let first = raw.number("max_window_layers")?.unwrap_or(28);
    Ok((0..layers).map(|layer| Some(window).filter(|_| layer >= first)).collect())
}

/// Refuses sliding windows: only some layers have them, and GGUF files do not say which.
fn no_window(file: &Settings, config: &mut Config) -> Result<()> {
    let name = GGUF_WINDOW;
    match file.number(name)?.filter(|window| (1..config.context_length).contains(window)) {
        Some(window) => Err(file.refuse(name, window)),
        None => Ok(()),
    }
}

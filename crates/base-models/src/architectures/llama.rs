//! Llama (including SmolLM2), Mistral and Mixtral. In GGUF files all of them are named "llama".

use super::{
    Architecture, DEFAULTS, Defaults, GGUF_EXPERTS_WINDOW, GGUF_WINDOW, attention_biases,
    gguf_experts, rope, window,
};
use crate::config::{Config, Experts};
use crate::gguf_settings::Settings;
use crate::json::Fields;
use crate::names::{self, Names};
use longctx_core::Result;

pub(super) const LLAMA: Architecture = Architecture {
    name: "llama",
    defaults: DEFAULTS,
    read: llama,
    read_gguf,
    gguf_settings: GGUF_EXPERTS_WINDOW,
    folder_names: names::LLAMA,
    gguf_names: names::GGUF,
    gguf_interleaved: true,
};

fn llama(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &DEFAULTS)?;
    config.mlp_bias = raw.switch("mlp_bias")?.unwrap_or(false);
    attention_biases(raw, config)
}

pub(super) const MISTRAL: Architecture = Architecture {
    name: "mistral",
    defaults: Defaults { kv_heads: Some(8), context: 131_072, ..DEFAULTS },
    read: mistral,
    ..LLAMA
};

fn mistral(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &MISTRAL.defaults)?;
    config.windows = vec![window(raw, Some(4096))?; config.layers];
    Ok(())
}

pub(super) const MIXTRAL: Architecture = Architecture {
    name: "mixtral",
    defaults: Defaults {
        kv_heads: Some(8),
        context: 131_072,
        norm_eps: 1e-5,
        theta: 1_000_000.0,
        ..DEFAULTS
    },
    read: mixtral,
    folder_names: Names {
        router: "block_sparse_moe.gate",
        expert_gate: "block_sparse_moe.experts.{}.w1",
        expert_up: "block_sparse_moe.experts.{}.w3",
        expert_down: "block_sparse_moe.experts.{}.w2",
        ..names::LLAMA
    },
    ..LLAMA
};

fn mixtral(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &MIXTRAL.defaults)?;
    config.windows = vec![window(raw, None)?; config.layers];
    config.experts = Some(Experts {
        count: raw.number("num_local_experts")?.unwrap_or(8),
        per_token: raw.number("num_experts_per_tok")?.unwrap_or(2),
        intermediate_size: config.intermediate_size,
        normalize: true,
        ..Experts::default()
    });
    Ok(())
}

fn read_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    // A window applies to all layers.
    let window = file.number(GGUF_WINDOW)?.filter(|&window| window > 0);
    config.windows = vec![window; config.layers];
    if file.number("expert_count")?.unwrap_or(0) > 0 {
        config.experts = Some(gguf_experts(file, config, true)?);
    }
    Ok(())
}

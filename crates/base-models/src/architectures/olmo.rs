//! OLMo-2, whose blocks have norms behind them, and OLMoE.

use super::{Architecture, DEFAULTS, Defaults, GGUF_EXPERTS, attention_biases, gguf_experts, rope};
use crate::config::{Config, Experts, QkNorm};
use crate::gguf_settings::Settings;
use crate::json::Fields;
use crate::names;
use longctx_core::Result;

pub(super) const OLMO2: Architecture = Architecture {
    name: "olmo2",
    defaults: Defaults { norm_eps: 1e-5, bos: None, eos: &[50_279], ..DEFAULTS },
    read: |raw, config| {
        config.rope = rope(raw, config, &OLMO2.defaults)?;
        olmo2(config);
        attention_biases(raw, config)
    },
    read_gguf: |_, config| {
        olmo2(config);
        Ok(())
    },
    gguf_settings: &[],
    folder_names: names::POST_NORMS,
    gguf_names: names::GGUF,
    gguf_interleaved: false,
};

fn olmo2(config: &mut Config) {
    (config.pre_norms, config.post_norms) = (false, true);
    config.qk_norm = QkNorm::AllHeads;
}

pub(super) const OLMOE: Architecture = Architecture {
    name: "olmoe",
    defaults: Defaults { context: 4096, ..OLMO2.defaults },
    read: olmoe,
    read_gguf: olmoe_gguf,
    gguf_settings: GGUF_OLMOE,
    folder_names: names::LLAMA,
    ..OLMO2
};

const GGUF_OLMOE: &[&str] =
    &[GGUF_EXPERTS[0], GGUF_EXPERTS[1], GGUF_EXPERTS[2], "attention.clamp_kqv"];

fn olmoe(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &OLMOE.defaults)?;
    config.qk_norm = QkNorm::AllHeads;
    config.clamp_qkv = raw.float("clip_qkv")?;
    config.experts = Some(Experts {
        count: raw.either_number("num_experts", "num_local_experts")?.unwrap_or(64),
        per_token: raw.number("num_experts_per_tok")?.unwrap_or(8),
        intermediate_size: config.intermediate_size,
        normalize: raw.switch("norm_topk_prob")?.unwrap_or(false),
        ..Experts::default()
    });
    attention_biases(raw, config)
}

fn olmoe_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    config.qk_norm = QkNorm::AllHeads;
    config.clamp_qkv = file.nonzero("attention.clamp_kqv")?;
    config.experts = Some(gguf_experts(file, config, false)?);
    Ok(())
}

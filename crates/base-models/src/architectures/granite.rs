//! Granite 3: Llama with four multipliers.

use super::{Architecture, DEFAULTS, attention_biases, llama, rope};
use crate::config::Config;
use crate::gguf_settings::Settings;
use crate::json::Fields;
use longctx_core::Result;

pub(super) const GRANITE: Architecture = Architecture {
    name: "granite",
    defaults: DEFAULTS,
    read: granite,
    read_gguf,
    gguf_settings: &["attention.scale", "embedding_scale", "logit_scale", "residual_scale"],
    ..llama::LLAMA
};

fn granite(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &DEFAULTS)?;
    config.mlp_bias = raw.switch("mlp_bias")?.unwrap_or(false);
    let number = |name: &str| -> Result<f64> { Ok(raw.float(name)?.unwrap_or(1.0)) };
    config.embedding_scale = number("embedding_multiplier")?;
    config.residual_scale = number("residual_multiplier")?;
    config.attention_scale = Some(number("attention_multiplier")?);
    config.logit_scale = 1.0 / number("logits_scaling")?;
    attention_biases(raw, config)
}

fn read_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    config.embedding_scale = file.nonzero("embedding_scale")?.unwrap_or(1.0);
    config.residual_scale = file.nonzero("residual_scale")?.unwrap_or(1.0);
    config.attention_scale = file.nonzero("attention.scale")?;
    config.logit_scale = 1.0 / file.nonzero("logit_scale")?.unwrap_or(1.0);
    Ok(())
}

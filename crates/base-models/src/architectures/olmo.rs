//! OLMo-2 (norms after the blocks), OLMo-3 (sliding windows in addition) and OLMoE.

use super::{
    Architecture, DEFAULTS, Defaults, GGUF_EXPERTS, GGUF_WINDOW, attention_biases, gguf_experts,
    rope, rope_defaults, windows, windows_by_period,
};
use crate::config::{Config, Experts, QkNorm};
use crate::gguf_settings::Settings;
use crate::json::Fields;
use crate::names;
use crate::rope_settings::RopeSettings;
use longctx_core::{Error, Result, RopeScaling};

pub(super) const OLMO2: Architecture = Architecture {
    name: "olmo2",
    defaults: Defaults { norm_eps: 1e-5, bos: None, eos: &[50_279], ..DEFAULTS },
    read: |raw, config| {
        config.rope = rope(raw, config, &OLMO2.defaults)?;
        olmo2(config);
        attention_biases(raw, config)
    },
    read_gguf: olmo2_gguf,
    gguf_settings: &[GGUF_WINDOW],
    folder_names: names::POST_NORMS,
    gguf_names: names::GGUF,
    gguf_interleaved: false,
};

fn olmo2(config: &mut Config) {
    (config.pre_norms, config.post_norms) = (false, true);
    config.qk_norm = QkNorm::AllHeads;
}

/// Reads OLMo-2 or OLMo-3, which has the same name in llama.cpp. OLMo-3 has a window in all layers
/// except every fourth, and its rotary scaling applies to full layers only.
fn olmo2_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    olmo2(config);
    if let Some(window) = file.number(GGUF_WINDOW)?.filter(|&window| window > 0) {
        config.windows = windows_by_period(config.layers, window, PERIOD);
        config.windowed_rope =
            Some(RopeSettings { scaling: RopeScaling::None, ..config.rope.clone() });
    }
    Ok(())
}

/// Every `PERIOD`-th layer of OLMo-3 is full; the others have a sliding window.
const PERIOD: usize = 4;

pub(super) const OLMO3: Architecture = Architecture {
    name: "olmo3",
    defaults: Defaults { theta: 500_000.0, ..OLMO2.defaults },
    read: olmo3,
    ..OLMO2
};

fn olmo3(raw: &Fields, config: &mut Config) -> Result<()> {
    config.windows = windows(raw, config.layers, PERIOD)?;
    olmo3_ropes(raw, config)?;
    olmo2(config);
    attention_biases(raw, config)
}

/// Sets the rotary embeddings of full and of windowed layers.
fn olmo3_ropes(raw: &Fields, config: &mut Config) -> Result<()> {
    let defaults = rope_defaults(config, &OLMO3.defaults);
    let parameters = raw.fields("rope_parameters")?;
    let of = |name: &str| parameters.as_ref().map_or(Ok(None), |all| all.fields(name));
    let (full, local) = (of("full_attention")?, of("sliding_attention")?);
    let scaling = raw.fields("rope_scaling")?;
    if parameters.is_some() && (scaling.is_some() || (full.is_none() && local.is_none())) {
        let what = "rope_parameters beside rope_scaling, or without kinds of layers, in OLMo-3";
        return Err(Error::Unsupported(what.into()));
    }
    let theta = raw.float("rope_theta")?.unwrap_or(defaults.theta);
    if theta != defaults.theta && !local.as_ref().is_some_and(|local| local.has("rope_theta")) {
        // transformers 5 applies it to full layers only, version 4 to all layers.
        return Err(Error::Unsupported(format!("rope_theta {theta} of all layers in OLMo-3")));
    }
    let full = scaling.or(full);
    config.rope = RopeSettings::of_fields(raw, full.as_ref(), theta, &defaults)?;
    let local = RopeSettings::of_fields(raw, local.as_ref(), defaults.theta, &defaults)?;
    config.windowed_rope = Some(local);
    Ok(())
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

//! Gemma 1 to 3, the text models.

use super::{
    Architecture, DEFAULTS, Defaults, GGUF_WINDOW, attention_biases, rope, rope_defaults, windows,
    windows_by_period,
};
use crate::config::{Activation, Config, QkNorm};
use crate::gguf_settings::Settings;
use crate::json::Fields;
use crate::names;
use crate::rope_settings::RopeSettings;
use longctx_core::{Error, Result, RopeScaling};

/// The base of the rotary embedding in Gemma 3's windowed layers.
const LOCAL_THETA: f64 = 10_000.0;

pub(super) const GEMMA: Architecture = Architecture {
    name: "gemma",
    defaults: Defaults {
        kv_heads: Some(16),
        head_dim: Some(256),
        context: 8192,
        activation_value: Activation::GeluTanh,
        tied_embeddings: true,
        bos: Some(2),
        eos: &[1],
        ..DEFAULTS
    },
    read: gemma,
    read_gguf: common_gguf,
    gguf_settings: &[],
    folder_names: names::LLAMA,
    gguf_names: names::GGUF,
    gguf_interleaved: false,
};

fn gemma(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &GEMMA.defaults)?;
    // Early configurations name the exact GELU but mean its tanh approximation.
    if config.activation == Activation::Gelu {
        config.activation = Activation::GeluTanh;
    }
    common(raw, config)
}

/// Reads the settings of all Gemma models.
fn common(raw: &Fields, config: &mut Config) -> Result<()> {
    if raw.switch("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(Error::Unsupported("attention in both directions".into()));
    }
    config.norm_offset = true;
    config.embedding_scale = (config.hidden_size as f64).sqrt();
    attention_biases(raw, config)
}

/// In GGUF files the norms' weights include the added 1.
fn common_gguf(_: &Settings, config: &mut Config) -> Result<()> {
    config.embedding_scale = (config.hidden_size as f64).sqrt();
    config.activation = Activation::GeluTanh;
    Ok(())
}

pub(super) const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    defaults: Defaults { kv_heads: Some(4), activation: "hidden_activation", ..GEMMA.defaults },
    read: gemma2,
    read_gguf: gemma2_gguf,
    gguf_settings: &["attn_logit_softcapping", "final_logit_softcapping", GGUF_WINDOW],
    folder_names: names::POST_NORMS,
    ..GEMMA
};

fn gemma2(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &GEMMA2.defaults)?;
    config.attention_soft_cap = cap(raw, "attn_logit_softcapping", Some(50.0))?;
    config.logit_soft_cap = cap(raw, "final_logit_softcapping", Some(30.0))?;
    config.windows = windows(raw, config.layers, 2)?;
    later(raw, config)
}

/// Reads the settings of Gemma 2 and 3.
fn later(raw: &Fields, config: &mut Config) -> Result<()> {
    let scalar = raw.float("query_pre_attn_scalar")?.unwrap_or(256.0);
    config.attention_scale = Some(scalar.powf(-0.5));
    config.post_norms = true;
    common(raw, config)
}

/// Reads a soft cap: the default if the field is absent, none if it is null.
fn cap(raw: &Fields, name: &str, default: Option<f64>) -> Result<Option<f64>> {
    match raw.has(name) {
        true => raw.float(name),
        false => Ok(default),
    }
}

fn gemma2_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    config.attention_soft_cap = file.nonzero("attn_logit_softcapping")?;
    config.logit_soft_cap = file.nonzero("final_logit_softcapping")?;
    let window = file.number(GGUF_WINDOW)?.unwrap_or(4096);
    config.windows = windows_by_period(config.layers, window, 2);
    later_gguf(file, config, 46)
}

/// Sets the softmax scale from the head size or, in the models of 27 billion parameters, from the
/// hidden size divided by the number of heads. GGUF files have no field for this, so the number of
/// layers identifies the model.
fn later_gguf(file: &Settings, config: &mut Config, layers_of_27b: usize) -> Result<()> {
    let channels = match config.layers == layers_of_27b {
        true => config.hidden_size / config.heads.max(1),
        false => config.head_dim,
    };
    config.attention_scale = Some((channels as f64).powf(-0.5));
    config.post_norms = true;
    common_gguf(file, config)
}

pub(super) const GEMMA3_TEXT: Architecture = Architecture {
    name: "gemma3_text",
    defaults: Defaults { context: 131_072, theta: 1_000_000.0, ..GEMMA2.defaults },
    read: gemma3,
    read_gguf: gemma3_gguf,
    gguf_settings: &["final_logit_softcapping", "rope.freq_base_swa", GGUF_WINDOW],
    ..GEMMA2
};

/// llama.cpp's name of the architecture.
pub(super) const GGUF_GEMMA3: Architecture = Architecture { name: "gemma3", ..GEMMA3_TEXT };

fn gemma3(raw: &Fields, config: &mut Config) -> Result<()> {
    let period = raw.number("sliding_window_pattern")?.unwrap_or(6);
    config.windows = windows(raw, config.layers, period)?;
    config.attention_soft_cap = cap(raw, "attn_logit_softcapping", None)?;
    config.logit_soft_cap = cap(raw, "final_logit_softcapping", None)?;
    config.qk_norm = QkNorm::PerHead;
    gemma3_ropes(raw, config)?;
    later(raw, config)
}

/// Sets the rotary embeddings of full and of windowed layers. Older configurations give the bases
/// in two fields, and a scaling that applies to full layers.
fn gemma3_ropes(raw: &Fields, config: &mut Config) -> Result<()> {
    let defaults = rope_defaults(config, &GEMMA3_TEXT.defaults);
    let parameters = raw.fields("rope_parameters")?;
    let of = |name: &str| parameters.as_ref().map_or(Ok(None), |all| all.fields(name));
    let scaling = match raw.fields("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => of("full_attention")?,
    };
    let theta = raw.float("rope_theta")?.unwrap_or(defaults.theta);
    config.rope = RopeSettings::of_fields(raw, scaling.as_ref(), theta, &defaults)?;
    let theta = raw.float("rope_local_base_freq")?.unwrap_or(LOCAL_THETA);
    let local = of("sliding_attention")?;
    config.windowed_rope = Some(RopeSettings::of_fields(raw, local.as_ref(), theta, &defaults)?);
    Ok(())
}

fn gemma3_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    config.logit_soft_cap = file.nonzero("final_logit_softcapping")?;
    config.qk_norm = QkNorm::PerHead;
    let window = file.need_number(GGUF_WINDOW)?;
    config.windows = windows_by_period(config.layers, window, 6);
    config.windowed_rope = Some(RopeSettings {
        theta: file.float("rope.freq_base_swa")?.unwrap_or(LOCAL_THETA),
        scaling: RopeScaling::None,
        ..config.rope.clone()
    });
    later_gguf(file, config, 62)
}

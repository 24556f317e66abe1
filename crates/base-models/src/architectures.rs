//! The supported architectures: how to read their settings, and the names of their tensors.
//!
//! `docs/architectures.md` describes how to add one.

mod deepseek;
mod exaone;
mod gemma;
mod granite;
mod llama;
mod olmo;
mod phi;
mod qwen;
mod smollm;

use crate::config::{Activation, Config, Experts};
use crate::gguf_settings::Settings;
use crate::json::Fields;
use crate::names::Names;
use crate::rope_settings::{RopeDefaults, RopeSettings};
use longctx_core::{Error, Result};

/// An architecture.
pub(crate) struct Architecture {
    /// The name: `model_type` in a `config.json`, `general.architecture` in a GGUF file.
    pub name: &'static str,
    /// The values that `transformers` uses for fields missing from a `config.json`.
    pub defaults: Defaults,
    /// Reads the fields of a `config.json` that not all architectures have.
    pub read: fn(&Fields, &mut Config) -> Result<()>,
    /// The same from a GGUF file's metadata.
    pub read_gguf: fn(&Settings, &mut Config) -> Result<()>,
    /// The settings of GGUF files that `read_gguf` reads and not all architectures have.
    pub gguf_settings: &'static [&'static str],
    /// The tensors' names in a folder and in a GGUF file.
    pub folder_names: Names,
    pub gguf_names: Names,
    /// Whether llama.cpp's converter interleaves the rows of the query and key projections.
    pub gguf_interleaved: bool,
}

/// The values of missing fields.
#[derive(Clone, Copy)]
pub(crate) struct Defaults {
    /// Number of kv heads; `None`: the number of query heads.
    pub kv_heads: Option<usize>,
    /// Channels of a head; `None`: the hidden size divided by the number of heads.
    pub head_dim: Option<usize>,
    pub context: usize,
    pub norm_eps: f64,
    pub theta: f64,
    /// Whether the rotary embedding can be partial.
    pub partial_rotary: bool,
    /// The field that names the activation.
    pub activation: &'static str,
    pub activation_value: Activation,
    pub tied_embeddings: bool,
    pub bos: Option<u32>,
    pub eos: &'static [u32],
}

/// Llama's defaults.
const DEFAULTS: Defaults = Defaults {
    kv_heads: None,
    head_dim: None,
    context: 2048,
    norm_eps: 1e-6,
    theta: 10_000.0,
    partial_rotary: false,
    activation: "hidden_act",
    activation_value: Activation::Silu,
    tied_embeddings: false,
    bos: Some(1),
    eos: &[2],
};

/// All architectures.
const ALL: [&Architecture; 20] = [
    &llama::LLAMA,
    &llama::MISTRAL,
    &llama::MIXTRAL,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &qwen::QWEN3_MOE,
    &qwen::GGUF_QWEN3_MOE,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3_TEXT,
    &gemma::GGUF_GEMMA3,
    &smollm::SMOLLM3,
    &granite::GRANITE,
    &olmo::OLMO2,
    &olmo::OLMO3,
    &olmo::OLMOE,
    &phi::PHI3,
    &exaone::EXAONE4,
    &deepseek::DEEPSEEK_V2,
    &deepseek::DEEPSEEK_V3,
];

/// Architecture names that only GGUF files have, and names that only `config.json` has.
const GGUF_ONLY: [&str; 2] = ["gemma3", "qwen3moe"];
const FOLDER_ONLY: [&str; 7] =
    ["mistral", "mixtral", "gemma3_text", "qwen3_moe", "olmo3", "deepseek_v2", "deepseek_v3"];

/// Returns the architecture of a `model_type`.
pub(crate) fn of_folder(name: &str) -> Result<&'static Architecture> {
    named(name, &GGUF_ONLY)
}

/// Returns the architecture of a `general.architecture`.
pub(crate) fn of_gguf(name: &str) -> Result<&'static Architecture> {
    named(name, &FOLDER_ONLY)
}

fn named(name: &str, others: &[&str]) -> Result<&'static Architecture> {
    let mut known = ALL.into_iter().filter(|a| !others.contains(&a.name));
    known.clone().find(|a| a.name == name).ok_or_else(|| {
        let names: Vec<_> = known.by_ref().map(|a| a.name).collect();
        Error::Unsupported(format!("architecture {name:?} (known: {})", names.join(", ")))
    })
}

/// Reads a `config.json`.
pub(crate) fn read(raw: &Fields) -> Result<Config> {
    let name = raw.text("model_type")?.ok_or_else(|| raw.missing("model_type"))?;
    let architecture = of_folder(name)?;
    let mut config = read_common(raw, architecture)?;
    // Settings per layer are allocated next, so the number of layers is checked first.
    config.check()?;
    (architecture.read)(raw, &mut config)?;
    config.check()?;
    Ok(config)
}

/// Reads the fields of all architectures.
fn read_common(raw: &Fields, architecture: &Architecture) -> Result<Config> {
    let default = architecture.defaults;
    let number = |name: &str| raw.number(name)?.ok_or_else(|| raw.missing(name));
    let (heads, hidden_size) = (number("num_attention_heads")?, number("hidden_size")?);
    let head_dim = raw.number("head_dim")?.or(default.head_dim);
    let head_dim = head_dim.unwrap_or(hidden_size / heads.max(1));
    let kv_heads = match raw.number("num_key_value_heads")? {
        Some(n) => n,
        // Null means the number of query heads; a missing field means the architecture's default.
        None if raw.has("num_key_value_heads") => heads,
        None => default.kv_heads.unwrap_or(heads),
    };
    let context_length = raw.number("max_position_embeddings")?.unwrap_or(default.context);
    Ok(Config {
        family: architecture.name.to_owned(),
        vocab_size: number("vocab_size")?,
        hidden_size,
        intermediate_size: number("intermediate_size")?,
        layers: number("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        norm_eps: raw.float("rms_norm_eps")?.unwrap_or(default.norm_eps),
        // Set by the architectures, which read different fields.
        rope: RopeSettings::default(),
        context_length,
        activation: activation(raw, &default)?,
        tied_embeddings: raw.switch("tie_word_embeddings")?.unwrap_or(default.tied_embeddings),
        bos: match raw.has("bos_token_id") {
            true => raw.ids("bos_token_id").first().copied(),
            false => default.bos,
        },
        eos: match raw.has("eos_token_id") {
            true => raw.ids("eos_token_id"),
            false => default.eos.to_vec(),
        },
        ..Config::default()
    })
}

fn activation(raw: &Fields, default: &Defaults) -> Result<Activation> {
    match raw.text(default.activation)? {
        None => Ok(default.activation_value),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu") => Ok(Activation::Gelu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => {
            let known = "silu, gelu, gelu_pytorch_tanh";
            Err(Error::Unsupported(format!("activation {other:?} (known: {known})")))
        }
    }
}

/// Reads the rotary embedding of all layers.
fn rope(raw: &Fields, config: &Config, default: &Defaults) -> Result<RopeSettings> {
    RopeSettings::read(raw, &rope_defaults(config, default))
}

fn rope_defaults(config: &Config, default: &Defaults) -> RopeDefaults {
    RopeDefaults {
        theta: default.theta,
        head_dim: config.head_dim,
        context: config.context_length,
        partial: default.partial_rotary,
    }
}

/// Reads `attention_bias`: whether the four projections of attention have biases.
fn attention_biases(raw: &Fields, config: &mut Config) -> Result<()> {
    let bias = raw.switch("attention_bias")?.unwrap_or(false);
    (config.qkv_bias, config.out_bias) = (bias, bias);
    Ok(())
}

/// Reads the sliding windows of the layers from `layer_types`; `None` if the field is missing.
fn windows_by_type(
    raw: &Fields,
    layers: usize,
    window: Option<usize>,
) -> Result<Option<Vec<Option<usize>>>> {
    let Some(types) = raw.texts("layer_types")? else { return Ok(None) };
    if types.len() != layers {
        return Err(Error::mismatch("layer_types", format!("{layers} entries"), types.len()));
    }
    let of = |kind: &&str| match *kind {
        "sliding_attention" => Ok(window),
        "full_attention" => Ok(None),
        other => Err(Error::Unsupported(format!("a layer of type {other:?}"))),
    };
    types.iter().map(of).collect::<Result<_>>().map(Some)
}

/// Reads `sliding_window`: the default if the field is missing, no window if it is null.
fn window(raw: &Fields, default: Option<usize>) -> Result<Option<usize>> {
    Ok(match raw.number("sliding_window")? {
        Some(window) => Some(window),
        None if raw.has("sliding_window") => None,
        None => default,
    })
}

/// Returns windows for all layers except every `period`-th.
fn windows_by_period(layers: usize, window: usize, period: usize) -> Vec<Option<usize>> {
    (1..=layers).map(|n| Some(window).filter(|_| !n.is_multiple_of(period.max(1)))).collect()
}

/// Returns windows of `sliding_window` tokens for the layers of `layer_types`. Without this field,
/// all layers except every `period`-th have a window. `sliding_window` must be a number.
fn windows(raw: &Fields, layers: usize, period: usize) -> Result<Vec<Option<usize>>> {
    let window = window(raw, Some(4096))?.ok_or_else(|| raw.missing("sliding_window"))?;
    Ok(match windows_by_type(raw, layers, Some(window))? {
        Some(windows) => windows,
        None => windows_by_period(layers, window, period),
    })
}

/// Reads the mixture of experts of a GGUF file.
fn gguf_experts(file: &Settings, config: &Config, normalize: bool) -> Result<Experts> {
    let inner = file.number("expert_feed_forward_length")?;
    Ok(Experts {
        count: file.need_number("expert_count")?,
        per_token: file.need_number("expert_used_count")?,
        intermediate_size: inner.unwrap_or(config.intermediate_size),
        normalize,
        ..Experts::default()
    })
}

/// The settings of mixtures of experts in GGUF files.
const GGUF_EXPERTS: &[&str] = &["expert_count", "expert_used_count", "expert_feed_forward_length"];

/// The setting of the sliding window in GGUF files.
const GGUF_WINDOW: &str = "attention.sliding_window";

const GGUF_EXPERTS_WINDOW: &[&str] =
    &[GGUF_EXPERTS[0], GGUF_EXPERTS[1], GGUF_EXPERTS[2], GGUF_WINDOW];

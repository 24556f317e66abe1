//! The configuration of a stack.

use crate::config::size;
use crate::gated_mlp::Gate;
use crate::rg_lru::RgLruShape;
use longctx_core::{AttentionShape, Error, Result, Rope, RopeScaling};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

/// `config.json` with `"model_type": "hybrid"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(rename = "model_type")]
    _family: IgnoredAny,
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// The blocks of each layer, in order.
    pub layers: Vec<Vec<Block>>,
    #[serde(default)]
    pub norm: NormKind,
    #[serde(default = "norm_eps")]
    pub norm_eps: f32,
    #[serde(default = "embedding_scale")]
    pub embedding_scale: f32,
    pub logits_soft_cap: Option<f32>,
    pub eos_token_id: Option<Value>,
    pub attention: Option<AttentionSettings>,
    /// The mixer's fields, named as in the published `config.json` of Mamba.
    #[serde(default)]
    pub mamba: Map<String, Value>,
    /// The same for Mamba-2.
    #[serde(default)]
    pub mamba2: Map<String, Value>,
    pub rg_lru: Option<RgLruSettings>,
    pub mlp: Option<MlpSettings>,
}

fn norm_eps() -> f32 {
    1e-5
}

fn embedding_scale() -> f32 {
    1.0
}

impl Config {
    pub fn check(&self) -> Result<()> {
        size("vocab_size", self.vocab_size)?;
        size("hidden_size", self.hidden_size)?;
        size("layers", self.layers.len())
    }
}

/// A residual layer: a mixer or a feed-forward layer.
#[derive(Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Block {
    Attention,
    Mamba,
    Mamba2,
    Rwkv5,
    RgLru,
    /// A gated feed-forward layer.
    Mlp,
    /// RWKV-5's channel mixing.
    ChannelMix,
}

impl Block {
    /// Returns the name in the configuration and in tensor names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Mamba => "mamba",
            Self::Mamba2 => "mamba2",
            Self::Rwkv5 => "rwkv5",
            Self::RgLru => "rg_lru",
            Self::Mlp => "mlp",
            Self::ChannelMix => "channel_mix",
        }
    }

    /// Returns the settings of this kind of block, if it requires any.
    pub fn section<T>(self, section: Option<&T>) -> Result<&T> {
        let missing = || Error::setting(self.name(), "a section of settings", "none");
        section.ok_or_else(missing)
    }
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NormKind {
    #[default]
    Rms,
    Layer,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionSettings {
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    sliding_window: Option<usize>,
    #[serde(default = "rope_theta")]
    rope_theta: f64,
    #[serde(default = "all")]
    partial_rotary_factor: f64,
    #[serde(default)]
    pub output_bias: bool,
}

fn rope_theta() -> f64 {
    10_000.0
}

fn all() -> f64 {
    1.0
}

impl AttentionSettings {
    pub fn shape(&self, hidden: usize) -> Result<AttentionShape> {
        let heads = self.num_attention_heads;
        let kv_heads = self.num_key_value_heads.unwrap_or(heads);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        if let Some(window) = self.sliding_window {
            size("sliding_window", window)?;
        }
        size("attention.num_attention_heads", heads)?;
        size("attention.head_dim", head_dim)?;
        let shape = AttentionShape::new(heads, kv_heads, head_dim)?;
        Ok(AttentionShape { window: self.sliding_window, ..shape })
    }

    pub fn rope(&self, head_dim: usize) -> Result<Rope> {
        let rotary_dims = (head_dim as f64 * self.partial_rotary_factor) as usize;
        Rope::new(head_dim, rotary_dims, self.rope_theta, RopeScaling::None)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RgLruSettings {
    /// Number of blocks of the gates' block-diagonal matrices.
    num_heads: usize,
    lru_width: Option<usize>,
    #[serde(default = "taps")]
    conv1d_width: usize,
}

fn taps() -> usize {
    4
}

impl RgLruSettings {
    pub fn shape(&self, hidden: usize) -> Result<RgLruShape> {
        let (width, blocks) = (self.lru_width.unwrap_or(hidden), self.num_heads);
        size("rg_lru.num_heads", blocks)?;
        size("rg_lru.lru_width", width)?;
        size("rg_lru.conv1d_width", self.conv1d_width)?;
        if !width.is_multiple_of(blocks) {
            let expected = format!("a multiple of the {blocks} heads");
            return Err(Error::setting("rg_lru.lru_width", expected, width));
        }
        Ok(RgLruShape { hidden, width, blocks, taps: self.conv1d_width })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpSettings {
    intermediate_size: usize,
    #[serde(default)]
    pub hidden_act: Gate,
    #[serde(default)]
    pub bias: bool,
}

impl MlpSettings {
    pub fn inner(&self) -> Result<usize> {
        size("mlp.intermediate_size", self.intermediate_size)?;
        Ok(self.intermediate_size)
    }
}

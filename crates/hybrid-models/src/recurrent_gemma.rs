//! RecurrentGemma (arXiv 2404.07839): Griffin's recurrent blocks, and local attention in every
//! third layer.

use std::sync::Arc;

use crate::attention::Attention;
use crate::checkpoint::Checkpoint;
use crate::config::{ids, size};
use crate::gated_mlp::{Gate, GatedMlp};
use crate::host_model::HostModel;
use crate::mixer::{Mixer, ResidualBlock};
use crate::norm::Norm;
use crate::rg_lru::{RgLru, RgLruShape};
use half::bf16;
use longctx_core::{AttentionShape, Error, Result, Rope, RopeScaling};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    /// The size of both halves of the gated layer together.
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    lru_width: Option<usize>,
    #[serde(default = "default_window")]
    attention_window_size: usize,
    #[serde(default = "default_taps")]
    conv1d_width: usize,
    #[serde(default = "default_cap")]
    logits_soft_cap: f32,
    #[serde(default = "default_eps")]
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_parameters: Option<Rotary>,
    block_types: Option<Vec<String>>,
    hidden_activation: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    eos_token_id: Option<Value>,
}

#[derive(Deserialize)]
struct Rotary {
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_type: Option<String>,
}

fn default_window() -> usize {
    2048
}

fn default_taps() -> usize {
    4
}

fn default_cap() -> f32 {
    30.0
}

fn default_eps() -> f32 {
    1e-6
}

/// Builds the model from its `config.json`.
pub fn load(config: &Value, w: &Checkpoint) -> Result<HostModel> {
    let c = Config::deserialize(config)
        .map_err(|e| Error::setting("config.json", "the fields of a RecurrentGemma model", e))?;
    c.check()?;
    let hidden = c.hidden_size;
    // Weights are stored as differences from 1.
    let norm = |name: &str| -> Result<Norm> {
        let weight = w.tensor(&format!("{name}.weight"), &[hidden])?;
        Ok(Norm::Rms { weight: weight.iter().map(|x| 1.0 + x).collect(), eps: c.rms_norm_eps })
    };
    let shape = c.attention()?;
    let rope = Arc::new(c.rope(shape.head_dim)?);
    let mut residuals = Vec::new();
    for layer in 0..c.num_hidden_layers {
        let name = format!("model.layers.{layer}");
        let block = format!("{name}.temporal_block");
        let mixer = match c.is_attention(layer)? {
            true => {
                Mixer::Attention(Attention::load(w, &block, hidden, shape, rope.clone(), true)?)
            }
            false => Mixer::Recurrent(Box::new(RgLru::load(w, &block, c.rg_lru())?)),
        };
        let norm_name = format!("{name}.temporal_pre_norm");
        residuals.push(ResidualBlock {
            layer,
            name: "temporal_block",
            norm: norm(&norm_name)?,
            mixer,
        });
        let (mlp, inner) = (format!("{name}.mlp_block"), c.intermediate_size / 2);
        let mlp = GatedMlp::load(w, &mlp, hidden, inner, Gate::Gelu, true)?;
        residuals.push(ResidualBlock {
            layer,
            name: "mlp_block",
            norm: norm(&format!("{name}.channel_pre_norm"))?,
            mixer: Mixer::Recurrent(Box::new(mlp)),
        });
    }
    let head = "lm_head.weight";
    Ok(HostModel {
        family: "recurrent_gemma",
        hidden,
        layers: c.num_hidden_layers,
        embedding: w.matrix("model.embed_tokens.weight", c.vocab_size, hidden)?,
        // The published models were trained with the factor in bf16.
        embedding_scale: bf16::from_f64((hidden as f64).sqrt()).to_f32(),
        embedding_norm: None,
        residuals,
        norm: norm("model.final_norm")?,
        head: w.has(head).then(|| w.matrix(head, c.vocab_size, hidden)).transpose()?,
        soft_cap: Some(c.logits_soft_cap),
        eos: ids(c.eos_token_id.as_ref()),
    })
}

impl Config {
    fn check(&self) -> Result<()> {
        if let Some(other) = self.hidden_activation.as_deref().filter(|&a| a != "gelu_pytorch_tanh")
        {
            return Err(Error::Unsupported(format!("activation {other:?}")));
        }
        if self.attention_bias {
            return Err(Error::Unsupported("biases of queries, keys and values".into()));
        }
        let rope_type = self.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
        if let Some(other) = rope_type.filter(|&kind| kind != "default") {
            return Err(Error::Unsupported(format!("rope_parameters.rope_type {other:?}")));
        }
        let RgLruShape { width, blocks, .. } = self.rg_lru();
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("head_dim", self.head_dim.unwrap_or(1)),
            ("lru_width", width),
            ("intermediate_size", self.intermediate_size / 2),
            ("conv1d_width", self.conv1d_width),
            ("attention_window_size", self.attention_window_size),
        ] {
            size(name, value)?;
        }
        if !width.is_multiple_of(blocks) {
            let expected = format!("a multiple of the {blocks} heads");
            return Err(Error::setting("lru_width", expected, width));
        }
        Ok(())
    }

    /// Returns whether a layer is attention. `block_types` is a repeating pattern.
    fn is_attention(&self, layer: usize) -> Result<bool> {
        let default = ["recurrent", "recurrent", "attention"];
        let types = self.block_types.as_deref().filter(|types| !types.is_empty());
        let of_layer = types.map_or(default[layer % 3], |types| &types[layer % types.len()]);
        match of_layer {
            "attention" | "sliding_attention" => Ok(true),
            "recurrent" | "linear_attention" => Ok(false),
            other => Err(Error::setting("block_types", "recurrent or attention", other)),
        }
    }

    fn attention(&self) -> Result<AttentionShape> {
        let heads = self.num_attention_heads;
        let kv_heads = self.num_key_value_heads.unwrap_or(heads);
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / heads.max(1));
        let shape = AttentionShape::new(heads, kv_heads, head_dim)?;
        Ok(AttentionShape { window: Some(self.attention_window_size), ..shape })
    }

    fn rg_lru(&self) -> RgLruShape {
        RgLruShape {
            hidden: self.hidden_size,
            width: self.lru_width.unwrap_or(self.hidden_size),
            blocks: self.num_attention_heads,
            taps: self.conv1d_width,
        }
    }

    fn rope(&self, head_dim: usize) -> Result<Rope> {
        let nested = self.rope_parameters.as_ref();
        let theta = self.rope_theta.or(nested.and_then(|r| r.rope_theta)).unwrap_or(10_000.0);
        let factor = self.partial_rotary_factor.or(nested.and_then(|r| r.partial_rotary_factor));
        let rotary_dims = (head_dim as f64 * factor.unwrap_or(0.5)) as usize;
        Rope::new(head_dim, rotary_dims, theta, RopeScaling::None)
    }
}

//! Stacks of mixers in any order and proportion, in the project's own format of configuration and
//! tensor names: docs/hybrid-models.md.

mod settings;

use std::sync::Arc;

use crate::attention::Attention;
use crate::checkpoint::Checkpoint;
use crate::config::ids;
use crate::gated_mlp::GatedMlp;
use crate::host_model::HostModel;
use crate::mamba::Mamba;
use crate::mamba_lm;
use crate::mamba2::Mamba2;
use crate::mixer::{Mixer, Recurrent, ResidualBlock};
use crate::norm::Norm;
use crate::rg_lru::RgLru;
use crate::rwkv::{channel_mix_of_v5, time_mix_of_v5};
use longctx_core::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use settings::{Block, Config, NormKind};

/// Builds a stack from its `config.json`.
pub fn load(config: &Value, w: &Checkpoint) -> Result<HostModel> {
    let c = Config::deserialize(config)
        .map_err(|e| Error::setting("config.json", "the fields of a hybrid stack", e))?;
    c.check()?;
    let (hidden, vocab) = (c.hidden_size, c.vocab_size);
    let norm = |name: &str| c.norm(w, name);
    let mut residuals = Vec::new();
    for (layer, blocks) in c.layers.iter().enumerate() {
        for (i, &block) in blocks.iter().enumerate() {
            if blocks[..i].contains(&block) {
                let got = format!("two of {:?} in layer {layer}", block.name());
                return Err(Error::setting("layers", "one block of a kind per layer", got));
            }
            let name = format!("layers.{layer}.{}", block.name());
            residuals.push(ResidualBlock {
                layer,
                name: block.name(),
                norm: norm(&format!("{name}_norm"))?,
                mixer: c.mixer(w, &name, block)?,
            });
        }
    }
    let optional = |name: &str| w.has(&format!("{name}.weight"));
    Ok(HostModel {
        family: "hybrid",
        hidden,
        layers: c.layers.len(),
        embedding: w.matrix("embed.weight", vocab, hidden)?,
        embedding_scale: c.embedding_scale,
        embedding_norm: optional("embed_norm").then(|| norm("embed_norm")).transpose()?,
        residuals,
        norm: norm("final_norm")?,
        head: optional("head").then(|| w.matrix("head.weight", vocab, hidden)).transpose()?,
        soft_cap: c.logits_soft_cap,
        eos: ids(c.eos_token_id.as_ref()),
    })
}

impl Config {
    fn norm(&self, w: &Checkpoint, name: &str) -> Result<Norm> {
        let tensor = |part: &str| w.tensor(&format!("{name}.{part}"), &[self.hidden_size]);
        let (weight, eps) = (tensor("weight")?, self.norm_eps);
        Ok(match self.norm {
            NormKind::Rms => Norm::Rms { weight, eps },
            NormKind::Layer => Norm::Layer { weight, bias: tensor("bias")?, eps },
        })
    }

    fn mixer(&self, w: &Checkpoint, name: &str, block: Block) -> Result<Mixer> {
        let hidden = self.hidden_size;
        let recurrent: Box<dyn Recurrent> = match block {
            Block::Attention => {
                let settings = block.section(self.attention.as_ref())?;
                let shape = settings.shape(hidden)?;
                let rope = Arc::new(settings.rope(shape.head_dim)?);
                let bias = settings.output_bias;
                let attention = Attention::load(w, name, hidden, shape, rope, bias)?;
                return Ok(Mixer::Attention(attention));
            }
            Block::Mamba => Box::new(Mamba::load(w, name, mamba_lm::shape(&self.mamba, hidden)?)?),
            Block::Mamba2 => {
                let shape = mamba_lm::shape2(&self.mamba2, hidden, self.norm_eps)?;
                Box::new(Mamba2::load(w, name, shape)?)
            }
            Block::Rwkv5 => time_mix_of_v5(w, name, hidden)?,
            Block::ChannelMix => channel_mix_of_v5(w, name, hidden)?,
            Block::RgLru => {
                let shape = block.section(self.rg_lru.as_ref())?.shape(hidden)?;
                Box::new(RgLru::load(w, name, shape)?)
            }
            Block::Mlp => {
                let settings = block.section(self.mlp.as_ref())?;
                let (inner, gate) = (settings.inner()?, settings.hidden_act);
                Box::new(GatedMlp::load(w, name, hidden, inner, gate, settings.bias)?)
            }
        };
        Ok(Mixer::Recurrent(recurrent))
    }
}

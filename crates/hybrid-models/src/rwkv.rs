//! RWKV language models, versions 4 to 7: version detection and tensor names.
//!
//! There are two layouts: that of the authors' `.pth` files (`blocks.0.att.key.weight`) and that of
//! Hugging Face's `transformers` (`rwkv.blocks.0.attention.key.weight`). The sizes are derived from
//! the tensors.

mod channel_mix;
mod mix;
mod v4;
mod v5;
mod v6;
mod v7;
mod wkv;

pub use channel_mix::ChannelMix;
pub use v5::V5;
#[cfg(feature = "cuda")]
pub use {
    v4::V4,
    v6::V6,
    v7::{LowRank, V7},
};

use crate::checkpoint::Checkpoint;
use crate::host_model::HostModel;
use crate::mixer::{Mixer, Recurrent, ResidualBlock, StateArray};
use crate::norm::Norm;
use longctx_core::{Error, Result};
use serde_json::Value;

/// The end-of-text token in both vocabularies of RWKV models.
const END: u32 = 0;

/// Epsilon of the group norm of a head's outputs, as in the authors' package. Training divides the
/// outputs by 8 and uses 1e-5. This is equivalent: a norm of x / 8 with epsilon e equals a norm of
/// x with epsilon 64 e.
pub const GROUP_EPS: f32 = 64e-5;
/// The divisor of outputs in training.
const HEAD_SIZE_DIVISOR: u64 = 8;
/// Epsilon of the last norm. `transformers` also ignores the configuration here.
const LAST_EPS: f32 = 1e-5;

/// The tensor names of a layout.
pub struct Names {
    transformers: bool,
}

impl Names {
    fn of(w: &Checkpoint) -> Result<Self> {
        let embeddings = w.first_of(&["emb.weight", "rwkv.embeddings.weight"])?;
        Ok(Self { transformers: embeddings.starts_with("rwkv.") })
    }

    fn top(&self, part: &str) -> String {
        match (self.transformers, part) {
            (false, _) | (true, "head.weight") => part.to_owned(),
            (true, "emb.weight") => "rwkv.embeddings.weight".into(),
            (true, _) => format!("rwkv.{part}"),
        }
    }

    fn block(&self, layer: usize, part: &str) -> String {
        let part = match (self.transformers, part) {
            (true, "ln0") => "pre_ln",
            _ => part,
        };
        self.top(&format!("blocks.{layer}.{part}"))
    }

    /// Returns the name of a time mixing tensor.
    pub fn time(&self, layer: usize, part: &str) -> String {
        let block = if self.transformers { "attention" } else { "att" };
        self.block(layer, &format!("{block}.{}", self.mix(part)))
    }

    /// Returns the name of a channel mixing tensor.
    fn channel(&self, layer: usize, part: &str) -> String {
        let block = if self.transformers { "feed_forward" } else { "ffn" };
        self.block(layer, &format!("{block}.{}", self.mix(part)))
    }

    fn mix<'a>(&self, part: &'a str) -> &'a str {
        match (self.transformers, part) {
            (true, "time_mix_k") => "time_mix_key",
            (true, "time_mix_v") => "time_mix_value",
            (true, "time_mix_r") => "time_mix_receptance",
            (true, "time_mix_g") => "time_mix_gate",
            _ => part,
        }
    }
}

/// Detects the version of a checkpoint by tensors that only this version has.
fn version(w: &Checkpoint, names: &Names) -> Result<usize> {
    let has = |part: &str| w.has(&names.time(0, part));
    if has("r_k") {
        return Ok(7);
    }
    if has("time_maa_x") {
        return Ok(6);
    }
    if !has("ln_x.weight") {
        let other = || Error::Unsupported("a version of RWKV other than 4, 5.2, 6 and 7".into());
        return has("time_first").then_some(4).ok_or_else(other);
    }
    let decay = w.shape(&names.time(0, "time_decay")).unwrap_or_default();
    // Up to 5.1, a head has a single decay: one number per head, possibly with dimensions of 1.
    match decay.as_slice() {
        [_, size] if *size > 1 && has("gate.weight") => Ok(5),
        _ => {
            let what = "RWKV-5.0 and 5.1, whose heads decay as a whole; 5.2 is read";
            Err(Error::Unsupported(format!("{what} (time_decay is {decay:?})")))
        }
    }
}

/// Returns whether a checkpoint without `config.json` is RWKV.
pub fn is_rwkv(w: &Checkpoint) -> bool {
    w.has("emb.weight") && w.has("blocks.0.ln0.weight")
}

/// Builds the model. `config.json`, if it exists, sets the epsilon of the norms and the rescaling
/// of `transformers`.
pub fn load(config: &Value, w: &Checkpoint) -> Result<HostModel> {
    let names = Names::of(w)?;
    let version = version(w, &names)?;
    let embeddings = names.top("emb.weight");
    let [vocab, hidden] = w.matrix_dims(&embeddings, "[vocabulary, hidden]")?;
    let layers = (0..).take_while(|&i| w.has(&names.block(i, "ln1.weight"))).count();
    for (name, of_tensors) in [
        ("vocab_size", vocab as u64),
        ("hidden_size", hidden as u64),
        ("num_hidden_layers", layers as u64),
        ("head_size_divisor", HEAD_SIZE_DIVISOR),
    ] {
        if let Some(other) = config[name].as_u64().filter(|&given| given != of_tensors) {
            return Err(Error::setting(name, of_tensors, other));
        }
    }
    let eps = config["layer_norm_epsilon"].as_f64().unwrap_or(1e-5) as f32;
    // `transformers` halves the activations between the layers at regular intervals, to stay in the
    // range of f16. A norm cancels the factor except for its epsilon, which is scaled here instead.
    let rescale = config["rescale_every"].as_u64().filter(|&every| every > 0 && version == 4);
    let eps_at = |eps: f32, layer: usize| match rescale {
        Some(every) => eps * 4f32.powi((layer as u64 / every) as i32),
        None => eps,
    };
    let norm = |name: String, eps: f32| -> Result<Norm> {
        let tensor = |part: &str| w.tensor(&format!("{name}.{part}"), &[hidden]);
        Ok(Norm::Layer { weight: tensor("weight")?, bias: tensor("bias")?, eps })
    };
    let mut residuals = Vec::new();
    for layer in 0..layers {
        let time_mix: Box<dyn Recurrent> = match version {
            4 => Box::new(v4::V4::load(w, &names, layer, hidden)?),
            5 => Box::new(V5::load(w, |part| names.time(layer, part), hidden)?),
            6 => Box::new(v6::V6::load(w, &names, layer, hidden)?),
            _ => Box::new(v7::V7::load(w, &names, layer, hidden)?),
        };
        let channel_mix = ChannelMix::load(w, |part| names.channel(layer, part), hidden, version)?;
        let mixers = [("ln1", "time_mix", time_mix), ("ln2", "channel_mix", Box::new(channel_mix))];
        for (norm_name, name, mixer) in mixers {
            let norm = norm(names.block(layer, norm_name), eps_at(eps, layer))?;
            residuals.push(ResidualBlock { layer, name, norm, mixer: Mixer::Recurrent(mixer) });
        }
    }
    Ok(HostModel {
        family: ["rwkv4", "rwkv5", "rwkv6", "rwkv7"][version - 4],
        hidden,
        layers,
        embedding: w.matrix(&embeddings, vocab, hidden)?,
        embedding_scale: 1.0,
        embedding_norm: Some(norm(names.block(0, "ln0"), eps)?),
        residuals,
        norm: norm(names.top("ln_out"), eps_at(LAST_EPS, layers))?,
        head: Some(w.matrix(&names.top("head.weight"), vocab, hidden)?),
        soft_cap: None,
        eos: vec![END],
    })
}

/// Loads RWKV-5's time mixing outside of an RWKV model: tensors as in `att.`, with the prefix
/// `name`.
pub fn time_mix_of_v5(w: &Checkpoint, name: &str, hidden: usize) -> Result<Box<dyn Recurrent>> {
    Ok(Box::new(V5::load(w, |part| format!("{name}.{part}"), hidden)?))
}

/// Loads RWKV-5's channel mixing: tensors as in `ffn.`, with the prefix `name`.
pub fn channel_mix_of_v5(w: &Checkpoint, name: &str, hidden: usize) -> Result<Box<dyn Recurrent>> {
    Ok(Box::new(ChannelMix::load(w, |part| format!("{name}.{part}"), hidden, 5)?))
}

/// Returns the shape of a tensor `[heads, head_dim]` that fills the hidden size.
fn heads(w: &Checkpoint, name: &str, hidden: usize) -> Result<(usize, usize)> {
    match w.required_shape(name)?.as_slice() {
        &[heads, size] if heads * size == hidden => Ok((heads, size)),
        other => {
            let expected = format!("[heads, {hidden} / heads]");
            Err(Error::mismatch(format!("tensor {name:?}"), expected, format!("{other:?}")))
        }
    }
}

/// Returns the state of RWKV-5 to 7: the last row, for the token shift, and a matrix per head.
fn state_arrays(hidden: usize, heads: usize, head_dim: usize) -> Vec<StateArray> {
    let wkv = StateArray::new("wkv", &[heads, head_dim, head_dim]);
    vec![StateArray::new("shift", &[hidden]), wkv]
}

/// Returns the prefix of the names of the token shift's weights.
fn mix_prefix(version: usize) -> &'static str {
    match version {
        4 | 5 => "time_mix_",
        6 => "time_maa_",
        _ => "x_",
    }
}

/// Loads the weights of the previous row in the token shift. Up to version 5, checkpoints store the
/// weights of the current row.
fn load_mix(w: &Checkpoint, name: &str, hidden: usize, version: usize) -> Result<Vec<f32>> {
    let mut weights = w.tensor(name, &[hidden])?;
    if version <= 5 {
        weights.iter_mut().for_each(|x| *x = 1.0 - *x);
    }
    Ok(weights)
}

//! candle-transformers' recurrent models, which benchmarks compare with ours on the same weights.

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_transformers::models::{mamba, mamba2, recurrent_gemma, rwkv_v5};
use serde::de::DeserializeOwned;

use crate::recurrent::Outline;

/// A model of candle-transformers with its state.
pub trait Theirs {
    /// Whether the model reads a prompt in one call, and not only token by token.
    fn whole_prompts(&self) -> bool;

    /// Resets the state.
    ///
    /// # Errors
    /// candle's.
    fn reset(&mut self) -> Result<()>;

    /// Feeds tokens `[1, n]` and returns the logits of the last one.
    ///
    /// # Errors
    /// candle's.
    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor>;
}

/// Creates a model from an outline and its weights.
pub type Make = fn(&Outline, VarBuilder<'static>) -> Result<Box<dyn Theirs>>;

struct Mamba {
    model: mamba::Model,
    config: mamba::Config,
    weights: VarBuilder<'static>,
    state: mamba::State,
}

/// Mamba.
///
/// # Errors
/// candle's.
pub fn mamba(outline: &Outline, weights: VarBuilder<'static>) -> Result<Box<dyn Theirs>> {
    let config = config(outline)?;
    let model = mamba::Model::new(&config, weights.pp("backbone"))?;
    let state = mamba::State::new(1, &config, weights.dtype(), weights.device())?;
    Ok(Box::new(Mamba { model, config, weights, state }))
}

impl Theirs for Mamba {
    fn whole_prompts(&self) -> bool {
        false
    }

    fn reset(&mut self) -> Result<()> {
        let (dtype, device) = (self.weights.dtype(), self.weights.device());
        self.state = mamba::State::new(1, &self.config, dtype, device)?;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.model.forward(&tokens.squeeze(0)?, &mut self.state)?)
    }
}

struct Mamba2 {
    model: mamba2::Model,
    config: mamba2::Config,
    weights: VarBuilder<'static>,
    state: mamba2::State,
}

/// Mamba-2, with prompts in chunks of 256 tokens, as published.
///
/// # Errors
/// candle's.
pub fn mamba2(outline: &Outline, weights: VarBuilder<'static>) -> Result<Box<dyn Theirs>> {
    let config = config(outline)?;
    let model = mamba2::Model::new(&config, weights.pp("backbone"))?;
    let state = mamba2::State::new(1, &config, weights.dtype(), weights.device())?;
    Ok(Box::new(Mamba2 { model, config, weights, state }))
}

impl Theirs for Mamba2 {
    fn whole_prompts(&self) -> bool {
        true
    }

    fn reset(&mut self) -> Result<()> {
        let (dtype, device) = (self.weights.dtype(), self.weights.device());
        self.state = mamba2::State::new(1, &self.config, dtype, device)?;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        match tokens.dim(1)? {
            1 => Ok(self.model.forward(&tokens.squeeze(0)?, &mut self.state)?),
            _ => Ok(self.model.forward_prefill(tokens, &mut self.state, 256)?),
        }
    }
}

struct Rwkv5 {
    model: rwkv_v5::Model,
    config: rwkv_v5::Config,
    weights: VarBuilder<'static>,
    state: rwkv_v5::State,
}

/// RWKV-5.
///
/// # Errors
/// candle's.
pub fn rwkv5(outline: &Outline, weights: VarBuilder<'static>) -> Result<Box<dyn Theirs>> {
    let config = config(outline)?;
    let model = rwkv_v5::Model::new(&config, weights.clone())?;
    let state = rwkv5_state(&config, &weights)?;
    Ok(Box::new(Rwkv5 { model, config, weights, state }))
}

/// Returns an RWKV-5 state in the dtype of the weights. candle creates it in f32, but its model
/// reads the dtype of the weights.
fn rwkv5_state(config: &rwkv_v5::Config, weights: &VarBuilder<'_>) -> Result<rwkv_v5::State> {
    let mut state = rwkv_v5::State::new(1, config, weights.device())?;
    for layer in &mut state.per_layer {
        for part in
            [&mut layer.extract_key_value, &mut layer.linear_attention, &mut layer.feed_forward]
        {
            *part = part.to_dtype(weights.dtype())?;
        }
    }
    Ok(state)
}

impl Theirs for Rwkv5 {
    fn whole_prompts(&self) -> bool {
        false
    }

    fn reset(&mut self) -> Result<()> {
        self.state = rwkv5_state(&self.config, &self.weights)?;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.model.forward(tokens, &mut self.state)?)
    }
}

struct RecurrentGemma {
    model: recurrent_gemma::Model,
    config: recurrent_gemma::Config,
    weights: VarBuilder<'static>,
    seen: usize,
}

/// RecurrentGemma.
///
/// # Errors
/// candle's.
pub fn recurrent_gemma(outline: &Outline, weights: VarBuilder<'static>) -> Result<Box<dyn Theirs>> {
    let config = config(outline)?;
    let weights = weights.pp("model");
    let model = recurrent_gemma::Model::new(&config, weights.clone())?;
    Ok(Box::new(RecurrentGemma { model, config, weights, seen: 0 }))
}

impl Theirs for RecurrentGemma {
    fn whole_prompts(&self) -> bool {
        true
    }

    /// Resets by creating the model again, which has no function for it.
    fn reset(&mut self) -> Result<()> {
        self.model = recurrent_gemma::Model::new(&self.config, self.weights.clone())?;
        self.seen = 0;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        let logits = self.model.forward(tokens, self.seen)?;
        self.seen += tokens.dim(1)?;
        Ok(logits)
    }
}

/// Parses an outline's configuration as candle's type.
fn config<T: DeserializeOwned>(outline: &Outline) -> Result<T> {
    Ok(serde_json::from_value(outline.config.clone())?)
}

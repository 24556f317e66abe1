//! Where a model's weights come from.

use crate::linear::{Linear, Weight};
use candle_core::{DType, Device, Tensor};
use longctx_core::Result;

/// How weights are to be held.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where the model computes.
    pub device: Device,
    /// In which format it computes, and dense weights are held.
    pub dtype: DType,
    /// Whether quantized weights of a GGUF file are expanded to `dtype` at once. Packed, they take
    /// less memory and decoding is faster; the numbers are the same.
    pub expand: bool,
}

impl Default for LoadOptions {
    /// On the CPU, in f32, quantized weights kept packed.
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32, expand: false }
    }
}

/// Tensors by the names that Hugging Face checkpoints use, `model.layers.0.self_attn.q_proj.weight`
/// and so on.
pub(crate) trait Weights {
    /// A tensor of the given shape, in the model's dtype.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// A matrix `[out, in]`, dense or quantized.
    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight>;

    /// Whether there is a tensor of that name.
    fn has(&self, name: &str) -> bool;

    /// Checks that every tensor has been asked for, once the model is put together.
    fn finish(&self) -> Result<()>;

    /// A linear map, with a bias if asked for.
    fn linear(&self, name: &str, out: usize, inner: usize, bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{name}.weight"), out, inner)?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out])).transpose()?;
        Ok(Linear::new(weight, bias))
    }
}

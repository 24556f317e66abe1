//! Where a model's weights come from.

use crate::linear::{Linear, Weight};
use crate::names::Names;
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
    /// The longest sequence, in tokens, that will be fed. `None`: the model's context length.
    /// Rotary scalings that depend on the length (dynamic, longrope) are made for it.
    pub context_length: Option<usize>,
}

impl Default for LoadOptions {
    /// On the CPU, in f32, quantized weights kept packed.
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32, expand: false, context_length: None }
    }
}

impl LoadOptions {
    /// Numbers as a tensor, in the model's dtype and on its device.
    pub(crate) fn to_device(&self, numbers: &[f32]) -> Result<Tensor> {
        Ok(Tensor::new(numbers, &Device::Cpu)?.to_dtype(self.dtype)?.to_device(&self.device)?)
    }
}

/// Tensors by their names in the checkpoint.
pub(crate) trait Weights {
    /// What the architecture's tensors are called.
    fn names(&self) -> &Names;

    /// A tensor of the given shape, in the model's dtype.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// A matrix `[out, in]`, dense or quantized.
    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight>;

    /// The matrices `[out, in]` of `count` experts. `{}` in the name stands for the expert's
    /// number.
    fn experts(&self, name: &str, count: usize, out: usize, inner: usize) -> Result<Vec<Weight>> {
        let name = |expert: usize| format!("{}.weight", name.replace("{}", &expert.to_string()));
        (0..count).map(|expert| self.matrix(&name(expert), out, inner)).collect()
    }

    fn options(&self) -> &LoadOptions;

    /// Whether there is a tensor of that name.
    fn has(&self, name: &str) -> bool;

    /// Factors that the rotary frequencies of all layers are divided by, if the checkpoint has
    /// them.
    fn rope_factors(&self) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }

    /// Checks that every tensor has been asked for, once the model is put together.
    fn finish(&self) -> Result<()>;

    /// A linear map, with a bias if asked for.
    fn linear(&self, name: &str, out: usize, inner: usize, bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{name}.weight"), out, inner)?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out])).transpose()?;
        Ok(Linear::new(weight, bias))
    }
}

//! The interface of checkpoints, and the options for loading weights.

use crate::linear::{Linear, Weight};
use crate::names::Names;
use candle_core::{DType, Device, Tensor};
use longctx_core::Result;

/// Options for loading weights.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The device of the model.
    pub device: Device,
    /// The dtype of activations and of dense weights.
    pub dtype: DType,
    /// Whether quantized weights of a GGUF file are expanded to `dtype` during loading. Packed
    /// weights need less memory and decode faster; the numbers are the same.
    pub expand: bool,
    /// The longest sequence that will be fed, in tokens; `None`: the model's context length. Rotary
    /// scalings that depend on the length (dynamic, longrope) use it.
    pub context_length: Option<usize>,
}

impl Default for LoadOptions {
    /// The CPU, f32, quantized weights packed.
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32, expand: false, context_length: None }
    }
}

impl LoadOptions {
    /// Returns numbers as a tensor in the model's dtype on its device.
    pub(crate) fn to_device(&self, numbers: &[f32]) -> Result<Tensor> {
        Ok(Tensor::new(numbers, &Device::Cpu)?.to_dtype(self.dtype)?.to_device(&self.device)?)
    }
}

/// The tensors of a checkpoint by name.
pub(crate) trait Weights {
    /// Returns the names of the architecture's tensors.
    fn names(&self) -> &Names;

    /// Reads a tensor of the given shape, in the model's dtype.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// Reads a matrix `[out, in]`, dense or quantized.
    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight>;

    /// Reads the matrices `[out, in]` of `count` experts. `{}` in the name is the expert's number.
    fn experts(&self, name: &str, count: usize, out: usize, inner: usize) -> Result<Vec<Weight>> {
        let name = |expert: usize| format!("{}.weight", name.replace("{}", &expert.to_string()));
        (0..count).map(|expert| self.matrix(&name(expert), out, inner)).collect()
    }

    fn options(&self) -> &LoadOptions;

    /// Returns whether a tensor with this name exists.
    fn has(&self, name: &str) -> bool;

    /// Returns divisors of the rotary frequencies of all layers, if the checkpoint has them.
    fn rope_factors(&self) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }

    /// Checks that every tensor has been read. Called after the model is complete.
    fn finish(&self) -> Result<()>;

    /// Reads a linear map; with `bias`, also its bias.
    fn linear(&self, name: &str, out: usize, inner: usize, bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{name}.weight"), out, inner)?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out])).transpose()?;
        Ok(Linear::new(weight, bias))
    }
}

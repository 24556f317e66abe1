//! Linear maps on the device.

use super::gate::Bias;
use super::product::product;
use candle_core::Tensor;
use longctx_core::Result;

/// A linear map with a bias, if it has one.
#[derive(Debug)]
pub struct Linear {
    /// `[out, inner]`.
    pub weight: Tensor,
    pub bias: Option<Bias>,
}

impl Linear {
    /// `[rows, inner]`, whole or columns of wider rows, to `[rows, out]`, both in the format of the weights.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = product(&x.unsqueeze(0)?, &self.weight.unsqueeze(0)?)?.squeeze(0)?;
        if let Some(bias) = &self.bias {
            bias.add(&y)?;
        }
        Ok(y)
    }
}

/// Linear maps of one shape, each with an input of its own.
#[derive(Debug)]
pub struct Batched {
    /// `[count, out, inner]`.
    pub weights: Tensor,
}

impl Batched {
    pub fn count(&self) -> usize {
        self.weights.dims()[0]
    }

    /// `[count, rows, inner]`, of any strides but for the last, to `[count, rows, out]`, both in the format of the weights.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        product(x, &self.weights)
    }
}

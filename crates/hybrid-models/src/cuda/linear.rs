//! Linear maps on the device.

use super::device_context::DeviceContext;
use super::gate::Bias;
use super::product::product;
use crate::linear::Linear as Host;
use crate::matrix::Matrix;
use candle_core::Tensor;
use longctx_core::Result;

/// A linear map with an optional bias.
#[derive(Debug)]
pub struct Linear {
    /// `[out, inner]`.
    pub weight: Tensor,
    bias: Option<Bias>,
}

impl Linear {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        let bias = host.bias.as_ref().map(|bias| Bias::new(bias, to)).transpose()?;
        Ok(Self { bias, ..Self::of(&host.matrix, to)? })
    }

    /// Creates a map without a bias.
    pub fn of(matrix: &Matrix, to: &DeviceContext) -> Result<Self> {
        Ok(Self { weight: matrix.to_tensor(&to.device)?, bias: None })
    }

    /// Maps `[rows, inner]`, which may be columns of wider rows, to `[rows, out]`, both in the
    /// dtype of the weights.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = product(&x.unsqueeze(0)?, &self.weight.unsqueeze(0)?)?.squeeze(0)?;
        if let Some(bias) = &self.bias {
            bias.add(&y)?;
        }
        Ok(y)
    }
}

/// Linear maps of equal shape, each with its own input.
#[derive(Debug)]
pub struct Batched {
    /// `[count, out, inner]`.
    weights: Tensor,
}

impl Batched {
    pub fn new<'a>(
        matrices: impl IntoIterator<Item = &'a Matrix>,
        to: &DeviceContext,
    ) -> Result<Self> {
        let one = |matrix: &Matrix| matrix.to_tensor(&to.device);
        let all = matrices.into_iter().map(one).collect::<Result<Vec<_>>>()?;
        Ok(Self { weights: Tensor::stack(&all, 0)? })
    }

    pub fn count(&self) -> usize {
        self.weights.dims()[0]
    }

    /// Maps `[count, rows, inner]` to `[count, rows, out]`, both in the dtype of the weights. The
    /// last dimension must be contiguous; other strides are free.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        product(x, &self.weights)
    }
}

//! Random weights, for benchmarks of model shapes without checkpoints.

use crate::linear::Weight;
use crate::names::{self, Names};
use crate::weights::{LoadOptions, Weights};
use candle_core::Tensor;
use longctx_core::Result;

/// Random weights: matrices from N(0, 0.02²), as in initialisation, norms 1, biases 0.
pub(crate) struct Random(pub LoadOptions);

impl Weights for Random {
    fn options(&self) -> &LoadOptions {
        &self.0
    }

    fn names(&self) -> &Names {
        &names::POST_NORMS
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Self(LoadOptions { device, dtype, .. }) = self;
        Ok(match name.ends_with("bias") {
            true => Tensor::zeros(shape, *dtype, device)?,
            false => Tensor::ones(shape, *dtype, device)?,
        })
    }

    fn matrix(&self, _: &str, out: usize, inner: usize) -> Result<Weight> {
        let Self(LoadOptions { device, dtype, .. }) = self;
        let matrix = Tensor::randn(0f32, 0.02, (out, inner), device)?;
        Ok(Weight::Dense(matrix.to_dtype(*dtype)?))
    }

    fn has(&self, _: &str) -> bool {
        false
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

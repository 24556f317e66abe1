//! Helpers of the tests on a CUDA device.

use candle_core::{DType, Device, Tensor};

/// Normally distributed numbers on the CPU.
pub fn random(tokens: usize, heads: usize, d: usize, dtype: DType) -> Tensor {
    Tensor::randn(0f32, 1., (tokens, heads, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Norm of the error, relative to the norm of `want`.
pub fn relative(got: &Tensor, want: &Tensor) -> f32 {
    let f32 = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let (got, want) = (f32(got), f32(want));
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    norm((&got - &want).unwrap()) / norm(want)
}

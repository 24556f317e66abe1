//! The norm before a mixer: kernels/rows/norm.cuh.
#![allow(unsafe_code)]

use super::args;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, address};
use crate::norm::Norm as Host;
use candle_core::{DType, Tensor};
use longctx_core::Result;

#[derive(Debug)]
pub struct Norm {
    weight: Tensor,
    /// The bias of a layer norm; `None` for an RMS norm.
    bias: Option<Tensor>,
    eps: f32,
    /// The dtype of the output.
    dtype: DType,
    kernel: Kernel,
}

impl Norm {
    /// Copies a norm to the device. `wide`: its output is f32 instead of the dtype of the weights.
    pub fn new(host: &Host, wide: bool, to: &DeviceContext) -> Result<Self> {
        let (weight, bias, eps) = match host {
            Host::Rms { weight, eps } => (weight, None, *eps),
            Host::Layer { weight, bias, eps } => (weight, Some(to.vector(bias)?), *eps),
        };
        let (name, dtype) =
            if wide { ("rows_norm_wide", DType::F32) } else { ("rows_norm", to.dtype) };
        let kernel = to.kernel_with_shared(name, 256, size_of_val(weight.as_slice()))?;
        Ok(Self { weight: to.vector(weight)?, bias, eps, dtype, kernel })
    }

    /// Adds `added`, in the dtype of the weights, to `x`, f32 `[rows, channels]`, in place, and
    /// returns the norm of the sum.
    pub fn apply(&self, x: &Tensor, added: Option<&Tensor>) -> Result<Tensor> {
        let (rows, channels) = x.dims2()?;
        // SAFETY: the launch below writes every element.
        let y = unsafe { Tensor::empty((rows, channels), self.dtype, x.device())? };
        let or_none = |x: Option<&Tensor>| x.map_or(Ok(0), address);
        let args = args::Norm {
            x: address(x)?,
            added: or_none(added)?,
            weight: address(&self.weight)?,
            bias: or_none(self.bias.as_ref())?,
            y: address(&y)?,
            channels: channels as i32,
            eps: self.eps,
        };
        // SAFETY: the sizes are those of the contiguous tensors, which live until the end of this
        // function.
        unsafe { self.kernel.launch((rows, 1, 1), &args)? };
        Ok(y)
    }
}

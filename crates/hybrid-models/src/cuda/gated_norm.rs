//! Mamba-2's gated norm: kernels/rows/norm.cuh.
#![allow(unsafe_code)]

use super::args;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, Rows, address, uninit};
use candle_core::Tensor;
use longctx_core::Result;

/// An RMS norm by groups of channels.
#[derive(Debug)]
pub struct GatedNorm {
    weight: Tensor,
    groups: usize,
    eps: f32,
    kernel: Kernel,
}

impl GatedNorm {
    pub fn new(weight: &[f32], groups: usize, eps: f32, to: &DeviceContext) -> Result<Self> {
        let kernel = to.kernel_with_shared("rows_gated_norm", 256, size_of_val(weight) / groups)?;
        Ok(Self { weight: to.vector(weight)?, groups, eps, kernel })
    }

    /// Returns the norm of `x silu(gate)`, `[rows, channels]`. The gate may be columns of wider
    /// rows.
    pub fn apply(&self, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
        let (rows, channels) = x.dims2()?;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), x)? };
        let gate = Rows::of(gate)?;
        let args = args::GatedNorm {
            x: address(x)?,
            gate: gate.address,
            weight: address(&self.weight)?,
            y: address(&y)?,
            groups: self.groups as i32,
            group: (channels / self.groups) as i32,
            gate_row: gate.row,
            eps: self.eps,
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { self.kernel.launch((rows, self.groups, 1), &args)? };
        Ok(y)
    }
}

//! RWKV's norm of each head's output, fused with the operations after it:
//! kernels/rows/head_norm.cuh.
#![allow(unsafe_code)]

use super::args;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, address, uninit};
use crate::rwkv::GROUP_EPS;
use candle_core::Tensor;
use longctx_core::Result;

/// A layer norm of each head.
#[derive(Debug)]
pub struct HeadNorm {
    weight: Tensor,
    bias: Tensor,
    heads: usize,
    kernel: Kernel,
}

impl HeadNorm {
    pub fn new(
        (weight, bias): &(Vec<f32>, Vec<f32>),
        heads: usize,
        to: &DeviceContext,
    ) -> Result<Self> {
        let kernel = to.kernel("rows_head_norm", 128)?;
        Ok(Self { weight: to.vector(weight)?, bias: to.vector(bias)?, heads, kernel })
    }

    /// Returns the norm of `x` times the SiLU of `gate`, both `[rows, channels]`.
    pub fn with_silu(&self, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
        self.apply(x, gate, None)
    }

    /// Returns (the norm of `x`, plus `bonus` times `v`) times `gate`. `bonus` is f32 `[rows,
    /// heads]`, one factor per head. All others are `[rows, channels]`.
    pub fn with_bonus(
        &self,
        x: &Tensor,
        gate: &Tensor,
        v: &Tensor,
        bonus: &Tensor,
    ) -> Result<Tensor> {
        self.apply(x, gate, Some((v, bonus)))
    }

    fn apply(
        &self,
        x: &Tensor,
        gate: &Tensor,
        bonus: Option<(&Tensor, &Tensor)>,
    ) -> Result<Tensor> {
        let (rows, channels) = x.dims2()?;
        let dim = channels / self.heads;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), x)? };
        let args = args::HeadNorm {
            x: address(x)?,
            gate: address(gate)?,
            weight: address(&self.weight)?,
            bias: address(&self.bias)?,
            bonus: bonus.map_or(Ok(0), |(_, bonus)| address(bonus))?,
            v: bonus.map_or(Ok(0), |(v, _)| address(v))?,
            y: address(&y)?,
            rows: rows as i32,
            heads: self.heads as i32,
            dim: dim as i32,
            silu: bonus.is_none() as i32,
            eps: GROUP_EPS,
        };
        let lanes = dim.div_ceil(8).next_power_of_two();
        let grid = ((rows * self.heads * lanes).div_ceil(128), 1, 1);
        // SAFETY: the sizes are those of the contiguous tensors, which live until the end of this
        // function.
        unsafe { self.kernel.launch(grid, &args)? };
        Ok(y)
    }
}

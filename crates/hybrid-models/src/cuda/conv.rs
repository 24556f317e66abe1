//! The causal depthwise convolution on the device.
#![allow(unsafe_code)]

use super::args;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, Rows, address, uninit};
use crate::conv::Conv as Host;
use candle_core::Tensor;
use longctx_core::{Error, Result};

/// Must equal the constant in kernels/args.cuh, like the grids.
const MAX_TAPS: usize = 8;

#[derive(Debug)]
pub struct Conv {
    weight: Tensor,
    bias: Tensor,
    taps: usize,
    silu: bool,
    kernel: Kernel,
}

impl Conv {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        if host.taps > MAX_TAPS {
            let what = format!("a convolution of {} taps on a CUDA device", host.taps);
            return Err(Error::Unsupported(format!("{what}: kernels have up to {MAX_TAPS}")));
        }
        Ok(Self {
            weight: to.vector(&host.weight)?,
            bias: to.vector(&host.bias)?,
            taps: host.taps,
            silu: host.silu,
            kernel: to.kernel("conv", 128)?,
        })
    }

    /// Maps `[batch * tokens, channels]` to the same shape. The state is `[batch, taps - 1,
    /// channels]`.
    pub fn apply(&self, x: &Tensor, batch: usize, state: &Tensor) -> Result<Tensor> {
        let (rows, channels) = x.dims2()?;
        let tokens = rows / batch;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), x)? };
        let from = Rows::of(x)?;
        let args = args::Conv {
            x: from.address,
            weight: address(&self.weight)?,
            bias: address(&self.bias)?,
            state: address(state)?,
            y: address(&y)?,
            tokens: tokens as i32,
            channels: channels as i32,
            taps: self.taps as i32,
            silu: self.silu as i32,
            x_row: from.row,
            y_row: channels as i32,
        };
        let grid = (channels.div_ceil(256), tokens.div_ceil(64), batch);
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { self.kernel.launch(grid, &args)? };
        Ok(y)
    }
}

//! Elementwise functions of rows, mostly products with a function of a gate: kernels/rows/gate.cuh.
#![allow(unsafe_code)]

use super::args;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, Rows, address, uninit};
use candle_core::Tensor;
use longctx_core::Result;

/// The function of the gate, in the order of kernels/args.cuh.
#[derive(Debug, Clone, Copy)]
pub enum Function {
    Silu,
    Gelu,
    Sigmoid,
    Relu,
}

/// Computes `f(gate) x`.
#[derive(Debug)]
pub struct Gate {
    function: Function,
    /// Added to the gate and to x first.
    biases: Option<[Tensor; 2]>,
    kernel: Kernel,
}

impl Gate {
    pub fn new(function: Function, to: &DeviceContext) -> Result<Self> {
        Ok(Self { function, biases: None, kernel: to.kernel("rows_gate", 256)? })
    }

    /// Returns the gate with biases of the gate and of x.
    pub fn biased(self, biases: [Tensor; 2]) -> Self {
        Self { biases: Some(biases), ..self }
    }

    /// Applies it to `gate` and `x`, both `[rows, channels]`. They may be columns of wider rows.
    pub fn apply(&self, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
        let (rows, channels) = x.dims2()?;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), x)? };
        let (gate, x) = (Rows::of(gate)?, Rows::of(x)?);
        let bias = |i: usize| self.biases.as_ref().map_or(Ok(0), |biases| address(&biases[i]));
        let args = args::Gate {
            gate: gate.address,
            x: x.address,
            gate_bias: bias(0)?,
            x_bias: bias(1)?,
            y: address(&y)?,
            rows: rows as i32,
            channels: channels as i32,
            gate_row: gate.row,
            x_row: x.row,
            function: self.function as i32,
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { self.kernel.launch(grid(rows, channels), &args)? };
        Ok(y)
    }
}

/// Computes `x + (other - x) sigmoid(share + bias)`.
#[derive(Debug)]
pub struct Blend {
    bias: Tensor,
    kernel: Kernel,
}

impl Blend {
    pub fn new(bias: &[f32], to: &DeviceContext) -> Result<Self> {
        Ok(Self { bias: to.vector(bias)?, kernel: to.kernel("rows_blend", 256)? })
    }

    /// Applies it to tensors `[rows, channels]`.
    pub fn apply(&self, x: &Tensor, other: &Tensor, share: &Tensor) -> Result<Tensor> {
        let (rows, channels) = x.dims2()?;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), x)? };
        let args = args::Blend {
            x: address(x)?,
            other: address(other)?,
            share: address(share)?,
            bias: address(&self.bias)?,
            y: address(&y)?,
            rows: rows as i32,
            channels: channels as i32,
        };
        // SAFETY: the sizes are those of the contiguous tensors, which live until the end of this
        // function.
        unsafe { self.kernel.launch(grid(rows, channels), &args)? };
        Ok(y)
    }
}

/// A bias added to every row.
#[derive(Debug)]
pub struct Bias {
    bias: Tensor,
    kernel: Kernel,
}

impl Bias {
    pub fn new(bias: &[f32], to: &DeviceContext) -> Result<Self> {
        Ok(Self { bias: to.vector(bias)?, kernel: to.kernel("rows_bias", 256)? })
    }

    /// Adds the bias to `[rows, channels]` in place.
    pub fn add(&self, y: &Tensor) -> Result<()> {
        let (rows, channels) = y.dims2()?;
        let args = args::Bias {
            y: address(y)?,
            bias: address(&self.bias)?,
            rows: rows as i32,
            channels: channels as i32,
        };
        // SAFETY: the sizes are those of the contiguous tensors, which live until the end of this
        // function.
        unsafe { self.kernel.launch(grid(rows, channels), &args) }
    }
}

fn grid(rows: usize, channels: usize) -> (usize, usize, usize) {
    ((rows * channels.div_ceil(8)).div_ceil(256), 1, 1)
}

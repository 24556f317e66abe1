//! Mamba's selective scan on the device: kernels/selective_scan.cu.
#![allow(unsafe_code)]

use super::args;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, Rows, SCAN_FEW_SHARED, SCAN_SHARED, address, uninit};
use crate::mamba::Mamba as Host;
use candle_core::Tensor;
use longctx_core::{Error, Result};

/// States per channel of published models, which have their own kernel.
const USUAL_STATES: usize = 16;
/// Must equal the constant in kernels/args.cuh.
const MAX_STATES: usize = 256;
/// Channels per thread block of the kernel for few channels.
const FEW_CHANNELS: usize = 40;
/// Smallest number of tokens for which the kernel for few channels is used.
const FEW_TOKENS: usize = 64;

#[derive(Debug)]
pub struct Scan {
    /// `[channels, states]`.
    a: Tensor,
    skip: Tensor,
    time_bias: Tensor,
    states: usize,
    kernel: Kernel,
    /// Channels of a thread block.
    channels: usize,
    /// For many tokens if no multiprocessor gets two thread blocks; `None` if the device does not
    /// support it.
    few: Option<Kernel>,
    processors: usize,
}

/// The input rows of the scan, possibly columns of wider rows.
pub struct Inputs<'a> {
    pub u: &'a Tensor,
    /// Time steps before bias and softplus, per channel.
    pub steps: &'a Tensor,
    pub b: &'a Tensor,
    pub c: &'a Tensor,
    /// The output is multiplied by the SiLU of this.
    pub gate: &'a Tensor,
}

impl Scan {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        let (inner, states) = (host.shape.inner, host.shape.states);
        if states > MAX_STATES {
            let what = format!("Mamba with {states} states on a CUDA device");
            return Err(Error::Unsupported(format!("{what}: kernels have up to {MAX_STATES}")));
        }
        let (kernel, channels, few) = match states {
            USUAL_STATES => (
                to.kernel_with_shared("selective_scan", 128, SCAN_SHARED as usize)?,
                32,
                to.kernel_if_fits("selective_scan_few", 320, SCAN_FEW_SHARED)?,
            ),
            _ => (to.kernel("selective_scan_generic", 128)?, 4, None),
        };
        Ok(Self {
            a: to.vector(&host.a())?.reshape((inner, states))?,
            skip: to.vector(&host.scan.skip)?,
            time_bias: to.vector(&host.scan.time_bias)?,
            states,
            kernel,
            channels,
            few,
            processors: to.processors(),
        })
    }

    /// Returns `[batch * tokens, channels]`. The state is `[batch, channels, states]`.
    pub fn apply(&self, inputs: Inputs<'_>, batch: usize, state: &Tensor) -> Result<Tensor> {
        let (rows, channels) = inputs.u.dims2()?;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), inputs.u)? };
        let (u, steps, z) = (Rows::of(inputs.u)?, Rows::of(inputs.steps)?, Rows::of(inputs.gate)?);
        let (b, c) = (Rows::of(inputs.b)?, Rows::of(inputs.c)?);
        let args = args::SelectiveScan {
            u: u.address,
            steps: steps.address,
            z: z.address,
            b: b.address,
            c: c.address,
            a: address(&self.a)?,
            d: address(&self.skip)?,
            bias: address(&self.time_bias)?,
            state: address(state)?,
            y: address(&y)?,
            tokens: (rows / batch) as i32,
            channels: channels as i32,
            states: self.states as i32,
            u_row: u.row,
            steps_row: steps.row,
            z_row: z.row,
            b_row: b.row,
            c_row: c.row,
            y_row: channels as i32,
        };
        let few = rows / batch >= FEW_TOKENS
            && channels.div_ceil(FEW_CHANNELS) * batch <= self.processors;
        let (kernel, of_block) = match &self.few {
            Some(kernel) if few => (kernel, FEW_CHANNELS),
            _ => (&self.kernel, self.channels),
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { kernel.launch((channels.div_ceil(of_block), batch, 1), &args)? };
        Ok(y)
    }
}

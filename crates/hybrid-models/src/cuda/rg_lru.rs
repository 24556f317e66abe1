//! Griffin's recurrent block on the device.
#![allow(unsafe_code)]

use super::args;
use super::conv::Conv;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, Rows, address, uninit};
use super::linear::{Batched, Linear};
use super::{Carried, Input, Mixer, arrays};
use crate::rg_lru::{RgLru as Host, RgLruShape};
use candle_core::{DType, Tensor};
use longctx_core::Result;

/// Channels and tokens of a thread block, as in kernels/args.cuh.
const CHANNELS: usize = 64;
const TOKENS: usize = 64;

#[derive(Debug)]
pub struct RgLru {
    shape: RgLruShape,
    project_in: Linear,
    conv: Conv,
    /// Gates of each block of channels: the recurrence's, then the input's.
    gates: Batched,
    recurrent_bias: Tensor,
    input_bias: Tensor,
    decay: Tensor,
    kernel: Kernel,
    project_out: Linear,
}

impl RgLru {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        Ok(Self {
            shape: host.shape,
            project_in: Linear::new(&host.project_in, to)?,
            conv: Conv::new(&host.conv, to)?,
            gates: Batched::new(&host.gates, to)?,
            recurrent_bias: to.vector(&host.recurrent_bias)?,
            input_bias: to.vector(&host.input_bias)?,
            decay: to.vector(&host.decay)?,
            kernel: to.kernel("rg_lru", 256)?,
            project_out: Linear::new(&host.project_out, to)?,
        })
    }

    /// The recurrence of `u`, times the GELU of `gate`: kernels/rg_lru.cu. `gates` are `[blocks,
    /// rows, 2 * width / blocks]`.
    fn scan(
        &self,
        [u, gates, gate]: [&Tensor; 3],
        batch: usize,
        first: bool,
        state: &Tensor,
    ) -> Result<Tensor> {
        let (rows, width) = u.dims2()?;
        let (tokens, block) = (rows / batch, width / self.shape.blocks);
        let parts = batch * width.div_ceil(CHANNELS) * tokens.div_ceil(TOKENS);
        // Values that blocks of tokens pass to the next ones.
        let scratch = (tokens > TOKENS)
            .then(|| Tensor::zeros(64 + 256 * parts, DType::F32, u.device()))
            .transpose()?;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, width), u)? };
        let (x, z, r) = (Rows::of(u)?, Rows::of(gate)?, address(gates)?);
        let args = args::RgLru {
            x: x.address,
            r,
            i: r + (block * u.dtype().size_in_bytes()) as u64,
            gate: z.address,
            r_bias: address(&self.recurrent_bias)?,
            i_bias: address(&self.input_bias)?,
            decay: address(&self.decay)?,
            state: address(state)?,
            y: address(&y)?,
            scratch: scratch.as_ref().map_or(Ok(0), address)?,
            batch: batch as i32,
            tokens: tokens as i32,
            channels: width as i32,
            x_row: x.row,
            gate_row: 2 * block as i32,
            y_row: width as i32,
            z_row: z.row,
            block: block as i32,
            block_stride: (rows * 2 * block) as i32,
            first: first as i32,
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { self.kernel.launch((parts, 1, 1), &args)? };
        Ok(y)
    }
}

impl Mixer for RgLru {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [conv, lru] = arrays(state)?;
        let RgLruShape { width, blocks, .. } = self.shape;
        let projected = self.project_in.apply(x.x)?;
        let u = self.conv.apply(&projected.narrow(1, width, width)?, x.batch, conv)?;
        let by_block = u.reshape((u.dim(0)?, blocks, width / blocks))?.transpose(0, 1)?;
        let gates = self.gates.apply(&by_block)?;
        let gate = projected.narrow(1, 0, width)?;
        let y = self.scan([&u, &gates, &gate], x.batch, x.first, lru)?;
        self.project_out.apply(&y)
    }
}

//! RWKV's token shift on the device, which mixes each row with the previous one:
//! kernels/rows/shift.cuh.
#![allow(unsafe_code)]

use super::Input;
use super::args;
use super::device_context::DeviceContext;
use super::kernels::{Kernel, address};
use candle_core::{DType, Tensor};
use longctx_core::Result;

/// Rows of a thread. Must equal the kernel's constant.
const RUN: usize = 4;

/// Several mixes of the same rows, each with a weight per channel.
#[derive(Debug)]
pub struct Shift {
    /// The weights of the previous row, `[mixes, channels]`.
    weights: Tensor,
    /// The dtype of the mixes.
    dtype: DType,
    kernel: Kernel,
}

impl Shift {
    pub fn new<'a>(
        mixes: impl IntoIterator<Item = &'a Vec<f32>>,
        to: &DeviceContext,
    ) -> Result<Self> {
        let mixes = mixes.into_iter().map(|mix| to.vector(mix)).collect::<Result<Vec<_>>>()?;
        let kernel = to.kernel("rows_shift", 128)?;
        Ok(Self { weights: Tensor::stack(&mixes, 0)?, dtype: to.dtype, kernel })
    }

    /// Returns the mixes `[mixes, rows, channels]` of f32 rows. The state `[batch, channels]` holds
    /// the row before each sequence's first one and is updated to its last.
    pub fn apply(&self, x: &Input<'_>, state: &mut Tensor) -> Result<Tensor> {
        self.apply_with(x, state, None)
    }

    /// As [`apply`](Self::apply). `more`, `[mixes, rows, channels]`, is added to the weights.
    pub fn apply_with(
        &self,
        x: &Input<'_>,
        state: &mut Tensor,
        more: Option<&Tensor>,
    ) -> Result<Tensor> {
        let last = match x.tokens <= RUN {
            // A thread reads the row before its run, and then writes it.
            true => state.clone(),
            // SAFETY: the launch writes every element.
            false => unsafe { Tensor::empty(state.shape(), DType::F32, state.device()) }?,
        };
        let mixed = self.mix(x, state, Some(&last), more)?;
        *state = last;
        Ok(mixed)
    }

    /// Returns the mixes. `before` holds the rows before the sequences' first ones; their last rows
    /// are written to `last`, if it is given.
    pub fn mix(
        &self,
        x: &Input<'_>,
        before: &Tensor,
        last: Option<&Tensor>,
        more: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (mixes, (rows, channels)) = (self.weights.dim(0)?, x.x.dims2()?);
        // SAFETY: the launch below writes every element.
        let y = unsafe { Tensor::empty((mixes, rows, channels), self.dtype, x.x.device()) }?;
        let args = args::Shift {
            x: address(x.x)?,
            before: address(before)?,
            last: last.map_or(Ok(0), address)?,
            weights: address(&self.weights)?,
            more: more.map_or(Ok(0), address)?,
            y: address(&y)?,
            tokens: x.tokens as i32,
            channels: channels as i32,
            mixes: mixes as i32,
        };
        let grid = (channels.div_ceil(1024), x.tokens.div_ceil(RUN), x.batch);
        // SAFETY: the sizes are those of the contiguous tensors, which live until the end of this
        // function.
        unsafe { self.kernel.launch(grid, &args)? };
        Ok(y)
    }
}

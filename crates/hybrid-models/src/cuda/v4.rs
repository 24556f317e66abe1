//! RWKV-4's time mixing on the device.
#![allow(unsafe_code)]

use super::args;
use super::device_context::DeviceContext;
use super::gate::{Function, Gate};
use super::kernels::{Kernel, Rows, address, uninit};
use super::linear::{Batched, Linear};
use super::shift::Shift;
use super::{Carried, Input, Mixer, arrays};
use crate::rwkv::V4 as Host;
use candle_core::Tensor;
use longctx_core::Result;

#[derive(Debug)]
pub struct V4 {
    shift: Shift,
    /// Projections of key, value and receptance.
    maps: Batched,
    gate: Gate,
    output: Linear,
    decay: Tensor,
    first: Tensor,
    kernel: Kernel,
}

impl V4 {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        Ok(Self {
            shift: Shift::new(&host.mixes, to)?,
            maps: Batched::new([&host.key, &host.value, &host.receptance], to)?,
            gate: Gate::new(Function::Sigmoid, to)?,
            output: Linear::of(&host.output, to)?,
            decay: to.vector(&host.decay)?,
            first: to.vector(&host.first)?,
            kernel: to.kernel("wkv4", 128)?,
        })
    }

    /// The recurrence: kernels/wkv/wkv4.cuh.
    fn wkv(&self, k: &Tensor, v: &Tensor, batch: usize, state: [&Tensor; 3]) -> Result<Tensor> {
        let (rows, channels) = k.dims2()?;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), k)? };
        let (k, v) = (Rows::of(k)?, Rows::of(v)?);
        let [numerator, denominator, largest] = state;
        let args = args::Wkv4 {
            k: k.address,
            v: v.address,
            decay: address(&self.decay)?,
            first: address(&self.first)?,
            numerator: address(numerator)?,
            denominator: address(denominator)?,
            largest: address(largest)?,
            y: address(&y)?,
            tokens: (rows / batch) as i32,
            channels: channels as i32,
            state_entry: channels as i32,
            k_row: k.row,
            v_row: v.row,
            y_row: channels as i32,
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { self.kernel.launch((channels.div_ceil(128), batch, 1), &args)? };
        Ok(y)
    }
}

impl Mixer for V4 {
    fn reads_f32(&self) -> bool {
        true
    }

    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [shift, numerator, denominator, largest] = arrays(state)?;
        let mixed = self.shift.apply(&x, shift)?;
        let maps = self.maps.apply(&mixed)?;
        let state = [&*numerator, denominator, largest];
        let y = self.wkv(&maps.get(0)?, &maps.get(1)?, x.batch, state)?;
        self.output.apply(&self.gate.apply(&maps.get(2)?, &y)?)
    }
}

//! RWKV-6's time mixing on the device.

use super::device_context::DeviceContext;
use super::head_norm::HeadNorm;
use super::linear::{Batched, Linear};
use super::shift::Shift;
use super::wkv::Wkv;
use super::{Carried, Input, Mixer, arrays};
use crate::rwkv::V6 as Host;
use candle_core::Tensor;
use longctx_core::Result;

#[derive(Debug)]
pub struct V6 {
    /// Token shift of the input of the other shifts' weights.
    shift_mix: Shift,
    shift_in: Linear,
    shift_out: Batched,
    /// Token shift of decay, key, value, receptance and gate.
    shift: Shift,
    decay_in: Linear,
    decay_out: Linear,
    /// Projections of key, value, receptance and gate.
    maps: Batched,
    wkv: Wkv,
    norm: HeadNorm,
    output: Linear,
}

impl V6 {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        Ok(Self {
            shift_mix: Shift::new([&host.shift_mix], to)?,
            shift_in: Linear::of(&host.shift_in, to)?,
            shift_out: Batched::new(&host.shift_out, to)?,
            shift: Shift::new(&host.mixes, to)?,
            decay_in: Linear::of(&host.decay_in, to)?,
            decay_out: Linear::of(&host.decay_out, to)?,
            maps: Batched::new(&host.maps, to)?,
            wkv: Wkv::new("wkv6", &host.decay, &host.bonus, host.head_dim, to)?,
            norm: HeadNorm::new(&host.group_norm, host.heads, to)?,
            output: Linear::of(&host.output, to)?,
        })
    }

    /// Returns the five mixes `[5, rows, hidden]`, whose weights depend on the rows.
    fn mixes(&self, x: &Input<'_>, state: &mut Tensor) -> Result<Tensor> {
        let mixed = self.shift_mix.mix(x, state, None, None)?;
        let bottlenecks = self.shift_in.apply(&mixed.get(0)?)?.tanh()?;
        let bottlenecks = bottlenecks.reshape((x.x.dim(0)?, self.shift_out.count(), ()))?;
        let more = self.shift_out.apply(&bottlenecks.transpose(0, 1)?)?;
        let mixed = self.shift.apply_with(x, state, Some(&more))?;
        Ok(mixed)
    }
}

impl Mixer for V6 {
    fn reads_f32(&self) -> bool {
        true
    }

    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [shift, wkv] = arrays(state)?;
        let mixed = self.mixes(&x, shift)?;
        let decays = self.decay_out.apply(&self.decay_in.apply(&mixed.get(0)?)?.tanh()?)?;
        let maps = self.maps.apply(&mixed.narrow(0, 1, self.maps.count())?)?;
        let [k, v, r, gate] = [0, 1, 2, 3].map(|i| maps.get(i));
        let y = self.wkv.apply([&r?, &k?, &v?], Some(&decays), x.batch, wkv)?;
        self.output.apply(&self.norm.with_silu(&y, &gate?)?)
    }
}

//! RWKV-5's time mixing on the device.

use super::device_context::DeviceContext;
use super::head_norm::HeadNorm;
use super::linear::{Batched, Linear};
use super::shift::Shift;
use super::wkv::Wkv;
use super::{Carried, Input, Mixer, arrays};
use crate::rwkv::V5 as Host;
use candle_core::Tensor;
use longctx_core::Result;

#[derive(Debug)]
pub struct V5 {
    shift: Shift,
    /// Projections of receptance, key, value and gate.
    maps: Batched,
    wkv: Wkv,
    norm: HeadNorm,
    output: Linear,
}

impl V5 {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        Ok(Self {
            shift: Shift::new(host.maps.iter().map(|(mix, _)| mix), to)?,
            maps: Batched::new(host.maps.iter().map(|(_, matrix)| matrix), to)?,
            wkv: Wkv::new("wkv5", &host.decay, &host.bonus, host.head_dim, to)?,
            norm: HeadNorm::new(&host.group_norm, host.heads, to)?,
            output: Linear::of(&host.output, to)?,
        })
    }
}

impl Mixer for V5 {
    fn reads_f32(&self) -> bool {
        true
    }

    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [shift, wkv] = arrays(state)?;
        let mixed = self.shift.apply(&x, shift)?;
        let maps = self.maps.apply(&mixed)?;
        let [r, k, v, gate] = [0, 1, 2, 3].map(|i| maps.get(i));
        let y = self.wkv.apply([&r?, &k?, &v?], None, x.batch, wkv)?;
        self.output.apply(&self.norm.with_silu(&y, &gate?)?)
    }
}

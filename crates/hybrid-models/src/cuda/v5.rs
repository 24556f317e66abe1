//! RWKV-5's time mixing on the device.

use super::shift::{Shift, differences};
use super::target::{Batched, GroupNorm, Linear, Target};
use super::wkv::Wkv;
use super::{Carried, Input, Mixer};
use crate::rwkv::{GROUP_EPS, V5 as Host};
use candle_core::{DType, Tensor};
use longctx_core::Result;

#[derive(Debug)]
pub struct V5 {
    shift: Shift,
    /// Of receptance, key, value and gate.
    maps: Batched,
    wkv: Wkv,
    group_norm: GroupNorm,
    output: Linear,
    dtype: DType,
}

impl V5 {
    pub fn new(host: &Host, to: &Target) -> Result<Self> {
        let (weight, bias) = &host.group_norm;
        Ok(Self {
            shift: Shift::new(host.maps.iter().map(|(mix, _)| mix), to)?,
            maps: to.batched(host.maps.iter().map(|(_, matrix)| matrix))?,
            wkv: Wkv::new("wkv5", &host.decay, &host.own, host.head_dim, to)?,
            group_norm: GroupNorm::new(to, weight, bias, host.head_dim, GROUP_EPS)?,
            output: to.matrix(&host.output)?,
            dtype: to.dtype,
        })
    }
}

impl Mixer for V5 {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [shift, wkv] = state else { unreachable!("the host's mixer has these arrays") };
        let differences = differences(&x, shift)?;
        let mixed = self.shift.apply(x.x, &differences)?.to_dtype(self.dtype)?;
        let maps = self.maps.apply(&mixed)?;
        let [r, k, v, gate] = [0, 1, 2, 3].map(|i| maps.get(i));
        let y = self.wkv.apply([&r?, &k?, &v?], None, x.batch, wkv)?;
        let y = self.group_norm.apply(&y.to_dtype(DType::F32)?)?.to_dtype(self.dtype)?;
        self.output.apply(&(y * gate?.silu()?)?)
    }
}
